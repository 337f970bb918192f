"""Advice on dropout for texts that are read many times."""

from __future__ import annotations

from typing import Any

import pytest

from cllm.core.settings import build
from cllm.training.passes import DROPOUT_FROM, advice

A_STEP = {"train.batch_size": 2, "train.accumulate": 3, "model.context": 32}
"""192 tokens."""


def advised(passes: float, **settings: Any) -> str | None:
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    config = build(A_STEP | {"train.steps": 10_000} | changed)
    return advice(config, round(10_000 * 192 / passes))


@pytest.mark.parametrize(("least", "dropout"), DROPOUT_FROM)
def test_it_says_what_was_best_from_so_many_passes_on(least: int, dropout: float) -> None:
    words = advised(least + 0.01)
    assert words is not None
    assert f"read {least} times" in words
    for name in ("embedding", "residual"):
        assert f"--set model.{name}_dropout={dropout:g}" in words
    below = advised(least - 0.01)
    assert below is None or f"={dropout:g}" not in below


@pytest.mark.parametrize("name", ["embedding", "residual", "attention"])
def test_whoever_set_one_is_not_advised(name: str) -> None:
    settings: dict[str, Any] = {f"model__{name}_dropout": 0.05}
    assert advised(50) is not None
    assert advised(50, **settings) is None
