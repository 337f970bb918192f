"""The bench of parallel training: it runs, judges nothing in a hurry, and its claims are the issue's."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cllm.bench import arena, parallel, traffic, training
from cllm.bench.contestants import SideBySide
from cllm.bench.harness import Options, render
from cllm.core.cpu import usable_threads
from cllm.core.errors import UserError

two_cores = pytest.mark.skipif(
    usable_threads() < 2 or not hasattr(os, "memfd_create"), reason="needs two cores and memfd"
)


@pytest.fixture(autouse=True)
def quick_rounds(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@two_cores
@pytest.mark.slow
def test_a_quick_run_measures_all_and_judges_nothing(corpus: Path) -> None:
    result = parallel.run(Options(quick=True, data=(str(corpus),)))
    rows = {(row.get("machine"), row["contestant"]): row for row in result.rows}
    for machine in ("idle", "beside another program"):
        for name in (parallel.ONE, parallel.DELAYED):
            assert rows[machine, name]["tokens/s"] > 0
    ends = [row for row in result.rows if row["contestant"].startswith("end of a step")]
    assert {row["contestant"] for row in ends} == {
        f"end of a step: {name}" for name in (arena.OURS, arena.THEIRS)
    }
    assert all(row["µs"] > 0 for row in ends)
    assert any("nothing in common" in name for machine, name in rows if machine == "idle")
    assert sum("bits per byte" in row for row in result.rows) == 2
    assert sum("ms waited" in row for row in result.rows) == 6
    sent = {row["contestant"]: row for row in result.rows if "forecast" in row}
    assert len(sent) == 8  # of DDP and FSDP bytes, sending and step; of stages not the sending
    for name in traffic.STRATEGIES:
        assert 0.97 < sent[f"{name}, nano: {traffic.SENT}"]["forecast ÷ measured"] < 1.03
        assert sent[f"{name}, nano: {traffic.STEP}"]["measured"] > 0
    for name in ("DDP", "FSDP"):
        found = sent[f"{name}, nano: {traffic.SENDING}"]["measured"]
        assert 0 < found < sent[f"{name}, nano: {traffic.STEP}"]["measured"]
    assert result.claims
    assert all(claim.holds is None and claim.why for claim in result.claims)
    assert "delayed pipeline" in render(result)


def test_contestants_side_by_side_run_at_the_same_time_and_are_added_up() -> None:
    """Each waits for the other: one after the other would break the barrier."""
    barrier = threading.Barrier(2, timeout=20)

    class Waits(SideBySide):
        def round(self) -> dict[str, Any]:
            barrier.wait()
            return {"tokens_per_second": float(self.name), "peak_rss": 10 * int(self.name)}

    both = SideBySide("both", [Waits("1", ()), Waits("2", ())])
    assert both.round() == {"tokens_per_second": 3.0, "peak_rss": 20}


def test_one_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "usable_threads", lambda: 1)
    with pytest.raises(UserError, match="one core"):
        parallel.run(Options())


def test_as_many_workers_as_the_batch_divides_among(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten cores the demo's 16 windows take eight: ten would be refused, and end the bench."""

    class MeasuredError(Exception):
        pass

    asked: list[str] = []

    def start(name: str, settings: list[str], steps: int, small: bool) -> None:
        asked.append(f"{name}: {settings[0]}")

    @contextmanager
    def contest(starts: list[Callable[[], None]]) -> Iterator[None]:
        for begin in starts:
            begin()
        raise MeasuredError
        yield

    for module in (parallel, training):
        monkeypatch.setattr(module, "usable_threads", lambda: 10)
        monkeypatch.setattr(module, "contest", contest)
    monkeypatch.setattr(parallel, "_start", start)
    with pytest.raises(MeasuredError):
        parallel.run(Options())
    assert "8 workers of one thread: train.parallel.workers=8" in asked
    monkeypatch.setattr(training, "require", lambda *names: None)
    monkeypatch.setattr(training, "_start", lambda name, call, *rest: asked.append(call))
    with pytest.raises(MeasuredError):
        training.run(Options())
    assert "ours --set train.parallel.workers=8" in asked


@pytest.mark.parametrize(
    ("crew", "beside", "holds"),
    [(1.9, 0.5, (True, True, True)), (1.8, 0.3, (False, False, False))],
)
def test_claims_compare_workers_with_a_thread_a_team_and_the_fair_share(
    crew: float, beside: float, holds: tuple[bool, ...]
) -> None:
    rates: dict[str, Any] = {
        "idle": {parallel.ONE: [1.0], "team": [1.7], "crew": [crew], "apart": [1.95]}
        | {parallel.DELAYED: [1.0]},
        "beside another program": {"team": [0.2], "crew": [crew * beside]},
    }
    claims = {c.name: c for c in parallel._claims(rates, 2, 2, "team", "crew", "apart", "")}
    names = (
        f"crew ÷ {parallel.ONE}",
        "crew ÷ team",
        "crew, beside another program: of the fair share",
    )
    assert tuple(claims[name].holds for name in names) == holds
    assert [claims[name].required for name in names] == [1.85, 1.1, 0.6]
    assert claims[names[0]].aim == 1.95
    assert claims["crew ÷ apart"].value == pytest.approx(crew / 1.95, abs=1e-3)
    assert claims["crew ÷ apart"].holds is None
    assert claims[f"{parallel.DELAYED} ÷ team"].required is None
    assert claims["team, beside another program: of the fair share"].holds is None
