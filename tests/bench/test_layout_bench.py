"""What the bench of layouts counts with is right, and it runs."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from cllm.bench.harness import Options, render
from cllm.bench.layout import run
from cllm.bench.layout_ids import Stream, disorder, zipf_stream
from cllm.bench.layout_misses import PAGES, cache_misses, page_misses
from cllm.text.layout import ORDERS


def test_pages_are_missed_as_counted_by_hand() -> None:
    few = np.arange(8 * PAGES)  # 8 rows a page: once warm, all pages are held
    assert page_misses(np.stack([few, few]), 512) == 0
    many = np.arange(
        8 * (PAGES + 1)
    )  # one page more, in a circle, and each is gone when it is wanted
    assert page_misses(np.stack([many, many]), 512) == 1 / 8
    assert page_misses(np.stack([many, many]), 4096) == 1


def test_zipf_ids_have_the_counts_that_they_say() -> None:
    stream = zipf_stream(50, 1.0, 200_000)
    found = np.bincount(stream.ids, minlength=50) / len(stream.ids)
    np.testing.assert_allclose(found, stream.counts / stream.counts.sum(), atol=5e-3)


def test_disorder_is_nothing_in_frequency_order_and_recovers_what_was_drawn() -> None:
    assert disorder(1 / np.arange(1, 99)) == 0
    # Ranks are places among the disturbed, which are drawn together: the same size, not the same.
    assert 0.3 < disorder(zipf_stream(20_000, 0.8, 1).counts) < 1.2


def test_a_quick_run_measures_every_order_and_judges_nothing() -> None:
    threads = torch.get_num_threads()
    result = run(Options(quick=True))
    assert torch.get_num_threads() == threads
    assert [row["order"] for row in result.rows] == [*ORDERS, *ORDERS]
    assert all(row["gather warm"] > 0 and row["scatter cold"] > 0 for row in result.rows)
    assert result.claims
    assert all(claim.holds is None for claim in result.claims)
    assert "quick" in render(result)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("valgrind"), reason="no valgrind here")
def test_cachegrind_counts_the_lines_of_rows() -> None:
    """A table larger than the second level, in a circle, misses all 8 lines of a row; a small one none."""
    large, small = np.arange(8 * 2048) % 8192, np.arange(8 * 2048) % 32
    streams = [Stream("large", large, np.ones(8192)), Stream("small", small, np.ones(32))]
    rows = [{"vocabulary": s.vocab_size, "ids": s.label, "order": "tokenizer"} for s in streams]
    assert cache_misses(streams, rows, 2048, 128) is None
    assert rows[0]["lines missed, level 2"] == pytest.approx(8, abs=0.5)
    assert rows[1]["lines missed, level 2"] < 1
