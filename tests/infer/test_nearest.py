"""Nearest rows by cosine."""

from __future__ import annotations

import pytest
import torch

from cllm.infer.nearest import nearest_by_cosine


def test_directions_alone_count() -> None:
    table = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    ids, cosines = nearest_by_cosine(table, 0, 10)
    assert ids[0] == 1
    assert set(ids[1:3]) == {2, 4}
    assert ids[3] == 3
    assert cosines == pytest.approx([9 / 82**0.5, 0, 0, -1])
    assert len(nearest_by_cosine(table, 0, 2)[0]) == 2


def test_rows_that_are_not_there_are_refused() -> None:
    for row, k in ((3, 1), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="row"):
            nearest_by_cosine(torch.ones(3, 2), row, k)


def test_a_table_that_is_not_finite_is_refused() -> None:
    table = torch.ones(4, 2)
    table[2, 1] = torch.nan
    with pytest.raises(
        ValueError, match=r"\(4, 2\) is not finite in row 2; take an earlier checkpoint"
    ):
        nearest_by_cosine(table, 0)
