"""The bench of tables: it runs, and what it concludes from points is right."""

from __future__ import annotations

import numpy as np
import pytest

from cllm.bench import tables
from cllm.bench.harness import Options, render
from cllm.bench.tables import Point, _claim, _shown, bytes_at
from cllm.store.run import RunDirectory


def point(method: str, size: int, rise: float) -> Point:
    return Point(method=method, setting="", size=size, rise=rise)


def test_bytes_are_interpolated_over_the_logarithm_of_the_rise():
    points = [point("a", 100, 1.0), point("a", 200, 0.01), point("a", 300, 0.02)]
    assert bytes_at(points, 0.1) == pytest.approx(150)
    assert bytes_at(points, 0.01) == pytest.approx(200)
    assert bytes_at(points, 0.001) is None
    assert bytes_at(points, 2.0) == 100
    assert bytes_at([], 0.1) is None


def test_a_claim_compares_with_the_best_other():
    points = [point("lattice", 100, 0.5), point("lattice", 140, 0.01)]
    points += [point("a", 150, 0.5), point("a", 250, 0.01), point("b", 300, 0.5)]
    claim = _claim(points, 0.1, quick=False)
    ours, best = (bytes_at([p for p in points if p.method == m], 0.1) for m in ("lattice", "a"))
    assert claim.value == pytest.approx(ours / best)
    assert claim.holds is (claim.value <= 0.8)
    assert _claim(points[2:], 0.1, quick=False).holds is None


def test_other_ways_of_the_codec_are_held_against_the_default():
    points = [point("lattice", 100, 0.5), point("lattice", 140, 0.01)]
    points += [point("lattice, E8", 110, 0.5), point("lattice, E8", 154, 0.01)]
    claim = _shown(points, "lattice, E8")
    assert claim.value == pytest.approx(1.1)
    assert claim.holds is None
    assert _shown(points, "lattice, integers").value is None


def test_quick_run_measures_all_methods_and_judges_nothing(trained, monkeypatch):
    pytest.importorskip("faiss")
    pytest.importorskip("constriction")
    # Reference runs have tests of their own.
    monkeypatch.setattr(tables, "reference_run", lambda config: RunDirectory.open(trained))
    result = tables.run(Options(quick=True))
    assert {row["method"] for row in result.rows} == {
        "integer rows",
        "PCA, int8",
        "product quantization",
        *tables.LATTICES,
    }
    by_setting = {row["setting"]: row for row in result.rows}
    assert abs(by_setting["int8"]["rise, nats a token"]) < 0.01
    assert by_setting["int3"]["bytes"] < by_setting["int8"]["bytes"]
    assert by_setting["step 1.0 σ"]["bytes"] < by_setting["step 0.5 σ"]["bytes"]
    assert all(claim.holds is None for claim in result.claims)
    assert np.isfinite([row["rise, nats a token"] for row in result.rows]).all()
    assert "quick" in render(result)
