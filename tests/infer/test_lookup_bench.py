"""The bench of look-ups: it runs, and what it measures with is right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm.bench import lookup, lookup_peers
from cllm.bench.harness import Options, render
from cllm.bench.lookup import run
from cllm.bench.lookup_contestant import PRODUCT, Contest, main, metric_of, recall
from cllm.bench.lookup_parts import Parts
from cllm.bench.lookup_peers import Building
from cllm.bench.lookup_tables import clustered_table, noisy_rows
from cllm.core.errors import UserError
from cllm.infer.lookup.metric import METRICS, exact_scores


def test_quick_run_measures_all_methods_and_judges_nothing() -> None:
    result = run(Options(quick=True))
    rows = {row["method"]: row for row in result.rows}
    for method in ("matrix product (torch)", "ours, plain scan", "ours, exact"):
        assert rows[method]["recall@10"] == 1, "ties apart, an exact answer"
    for method in ("ours, cells, tuned", "ours, cells, l2", "ours, cells, cosine"):
        assert 0.5 < rows[method]["recall@10"] <= 1
    assert all(row["µs, one query"] > 0 for row in result.rows)
    assert all(claim.holds is None for claim in result.claims)
    unlike = [claim.value for claim in result.claims if claim.name.startswith("exact=True")]
    assert unlike == [0, 0, 0]
    assert ("faiss Flat" in rows) != any("faiss is not installed" in note for note in result.notes)
    assert "--quick" in render(result)
    assert all(claim.required == 0 and not claim.higher_is_better for claim in result.claims[3:])


def test_a_part_is_measured_in_a_process_of_its_own_and_kept(isolated: Path) -> None:
    table, scan = {"V": 600, "D": 16}, "ours, plain scan"
    (row,) = Parts(rounds=1, minutes=None).rows(table, [scan])
    assert row["recall@10"] == 1
    late = Parts(rounds=1, minutes=0)
    assert late.rows(table, [PRODUCT, scan]) == [row]
    assert late.rows({"V": 601, "D": 16}, [scan]) == []
    assert late.missing == [f"{PRODUCT} (V=600, D=16)", f"{scan} (V=601, D=16)"]
    with pytest.raises(UserError, match=r"bench process .* failed: TypeError"):
        Parts(rounds=1, minutes=None).rows({"V": 600, "D": "nine"}, [scan])


def test_what_there_was_no_time_for_is_said_and_not_judged(isolated: Path) -> None:
    result = run(Options(minutes=0))
    assert not result.rows
    assert {claim.holds for claim in result.claims} == {None}
    assert {claim.why for claim in result.claims} == {lookup.UNMEASURED}
    assert "matrix product (torch) (V=1,000,000, D=128)" in render(result)


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
def test_an_index_that_the_time_ends_is_put_aside_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = clustered_table(900, 16)
    monkeypatch.setattr(lookup_peers, "STEP", 400)
    for rows in (400, 800):
        building = Building("faiss HNSW", table, tmp_path / "hnsw")
        building.go_on(until=0.0)
        assert building.index.ntotal == rows
        assert not building.is_whole
        building.keep()
    spent = building.seconds
    case: dict[str, Any] = {"V": 900, "D": 16, "methods": ["faiss HNSW"], "rounds": 1}
    (row,) = main(case | {"places": [str(tmp_path / "hnsw")], "seconds": 60})
    assert row is not None
    assert row["build s"] > spent > 0
    assert row["recall@10"] > 0.9
    (nothing,) = main(case | {"places": [str(tmp_path / "other")], "seconds": 0})
    assert nothing is None


@pytest.mark.parametrize("metric", METRICS)
def test_the_product_beside_a_method_is_exact_under_its_metric(metric: str) -> None:
    table = clustered_table(700, 16)
    queries = noisy_rows(table, 40)
    contest = Contest(table, queries, rounds=1, metric=metric)
    for some in (queries, queries[:1]):
        scores = np.stack([exact_scores(q.astype(np.float64), table, metric) for q in some])
        best = np.argsort(scores if metric == "l2" else -scores, axis=1)[:, :10]
        assert recall(contest.product(some), best) == 1


def test_a_method_names_its_metric() -> None:
    assert metric_of("ours, cells, l2") == "l2"
    assert metric_of("ours, cells, cosine") == "cosine"
    assert metric_of("ours, Leech cells, tuned") == metric_of(PRODUCT) == "ip"


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
