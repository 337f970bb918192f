"""The bench of look-ups: it runs, and what it measures with is right."""

from __future__ import annotations

import numpy as np

from cllm.bench.harness import Options, render
from cllm.bench.lookup import run
from cllm.bench.lookup_contestant import recall
from cllm.bench.lookup_tables import clustered_table, noisy_rows


def test_quick_run_measures_all_methods_and_judges_nothing() -> None:
    result = run(Options(quick=True))
    rows = {row["method"]: row for row in result.rows}
    for method in ("matrix product (torch)", "ours, plain scan", "ours, exact"):
        assert rows[method]["recall@10"] == 1, "ties apart, an exact answer"
    assert 0.5 < rows["ours, cells, tuned"]["recall@10"] <= 1
    assert all(row["µs, one query"] > 0 for row in result.rows)
    assert all(claim.holds is None for claim in result.claims)
    unlike = [claim.value for claim in result.claims if claim.name.startswith("exact=True")]
    assert unlike == [0, 0, 0]
    assert ("faiss Flat" in rows) != any("faiss is not installed" in note for note in result.notes)
    assert "--quick" in render(result)


def test_recall_counts_what_was_found() -> None:
    truth = np.array([[1, 2], [3, 4]])
    assert recall(np.array([[2, 1], [3, 9]]), truth) == 0.75
    assert recall(np.array([[0, 9], [9, 0]]), truth) == 0


def test_tables_are_the_same_each_time_and_clustered() -> None:
    table = clustered_table(2000, 16)
    assert (table == clustered_table(2000, 16)).all()
    assert (noisy_rows(table, 5) == noisy_rows(table, 5)).all()
    assert not (table == clustered_table(2000, 16, seed=1)).all()
    values = np.linalg.eigvalsh(np.cov(table.T))
    assert values[-1] > 5 * values[0]
