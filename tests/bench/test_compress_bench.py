"""The bench of compression: it runs, keeps what it measured, and judges only what it may."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllm.bench import compress_cases as known
from cllm.bench.compress import _claims, run
from cllm.bench.compress_cases import Case, cases
from cllm.bench.harness import Options, render


def test_a_quick_run_measures_and_judges_nothing(trained: Path, isolated: Path) -> None:
    pytest.importorskip("constriction")
    options = Options(quick=True, data=(str(trained),))
    result = run(options)
    assert [row["method"] for row in result.rows] == [case.method for case in cases(quick=True)]
    assert all(claim.holds is None for claim in result.claims)
    assert "too small to judge" in render(result)
    rows = {row["method"]: row for row in result.rows}
    # Coded layers take no more bytes than the grid's.
    assert rows[known.CODED_OURS]["bits a weight"] <= rows[known.GPTQ]["bits a weight"]
    assert rows[known.OURS]["layer error"] <= rows[known.GPTQ]["layer error"]
    # Kept: nothing is compressed any more, whatever the time.
    again = run(Options(quick=True, data=(str(trained),), minutes=0))
    assert again.rows == result.rows


def figures(rise: float) -> dict[str, float]:
    """What one case gave."""
    return {"bpb": 2 + rise, "base": 2.0, "bits": 2.25, "bytes": 9, "error": 0.1}


def test_claims_compare_means_over_three_runs_at_least() -> None:
    gptq, ours = Case(method=known.GPTQ, bits=2.0), Case(method=known.OURS, bits=2.0)
    measured = [{gptq: figures(0.1 * k), ours: figures(0.08 * k)} for k in (1, 2, 3)]
    claim = _claims(measured, quick=False)[0]
    assert claim.value == pytest.approx(0.8)
    assert claim.holds is True
    assert "3 runs ± 0.000" in claim.name
    assert _claims(measured[:2], quick=False)[0].holds is None
    measured[0][ours] = figures(0.3)
    assert _claims(measured, quick=False)[0].holds is False
