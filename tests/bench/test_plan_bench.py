"""The bench of plans: forecasts beside measurements, and claims that can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllm.bench import plan
from cllm.bench.harness import Options, render

ROW = {"time ratio": 1.1, "memory ratio": 0.9}


@pytest.mark.slow
def test_a_quick_run_measures_and_judges_nothing(isolated: Path) -> None:
    result = plan.run(Options(quick=True))
    (row,) = result.rows
    assert row["step, ms"] > 0
    assert row["measured, ms"] > 0
    assert 0 < row["memory, MB"] < 10_000
    assert all(claim.holds is None for claim in result.claims)
    assert "--quick measures nothing" in render(result)


@pytest.mark.parametrize(
    ("worst", "holds"), [({}, [True, True]), ({"time ratio": 0.65}, [False, True])]
)
def test_the_worst_forecast_is_judged(
    worst: dict[str, float], holds: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = iter([ROW | worst, *[ROW] * 100])
    monkeypatch.setattr(plan, "_row", lambda *arguments: next(rows))
    monkeypatch.setattr(plan, "is_busy", lambda: None)
    result = plan.run(Options())
    assert [claim.holds for claim in result.claims] == holds
    monkeypatch.setattr(plan, "is_busy", lambda: "others are at work")
    assert [claim.holds for claim in plan.run(Options()).claims] == [None, None]
