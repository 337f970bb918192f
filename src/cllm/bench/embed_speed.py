"""Tokens a second of every kind of table, in turns: trainings at other times say little of speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from cllm.bench.contestants import our_contestant
from cllm.bench.embed_cases import CORPUS, RANK32, RANK64, Case, speed_cases
from cllm.bench.harness import Claim, Contestant, contest, interleaved, ratio_of_medians

ROUNDS, STEPS = 7, 12
AT_ONCE = 4
"""Tables that take turns with the dense one: each is a process with a whole training in its memory."""


@dataclass(frozen=True)
class Speed:
    """Of a table: tokens a second, and how many times those of the dense table in the same rounds."""

    tokens_per_second: float
    over_dense: float


Speeds = dict[str, Speed]
"""By the name of a case."""


def speeds(corpus: str, *, quick: bool) -> Speeds:
    """Measure all tables on a text (the path; empty: the built-in one), some at once, each time with the
    dense one among them."""
    dense, *others = speed_cases()
    if quick:
        others = [RANK64]
    found = Speeds()
    for first in range(0, len(others), AT_ONCE):
        turns = _turns(corpus, [dense, *others[first : first + AT_ONCE]], quick=quick)
        for name, rates in turns.items():
            over = ratio_of_medians(rates, turns[dense.name])
            found.setdefault(name, Speed(median(rates), over))
    return found


def _turns(corpus: str, cases: Sequence[Case], *, quick: bool) -> dict[str, list[float]]:
    rounds, steps = (2, 2) if quick else (ROUNDS, STEPS)
    shape = ["--text", corpus, "--steps", str(steps), *(["--quick"] if quick else [])]
    with contest([partial(_start, case, shape) for case in cases]) as contestants:
        figures = interleaved(contestants, rounds)
    return {name: [r["tokens_per_second"] for r in found] for name, found in figures.items()}


def _start(case: Case, shape: list[str]) -> Contestant:
    return our_contestant(case.name, "cllm.bench.embed_contestant", [case.name, *shape])


def claims(found: Speeds, busy: str | None) -> list[Claim]:
    """What is required of the ranks: no fewer tokens a second than the dense table.

    ``busy`` says what keeps the machine busy; only then may ``found`` be empty.
    """
    assert found or busy
    return [
        Claim(
            name=f"tokens/s of {case.name} over {CORPUS.name}",
            value=found[case.name].over_dense if found else None,
            required=1.0,
            judged=not busy,
            why=busy or "",
        )
        for case in (RANK64, RANK32)
    ]
