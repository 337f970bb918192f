"""Tokens a second of dense and reduced tables, in turns: trainings at other times say little of speed."""

from __future__ import annotations

from functools import partial

from cllm.bench.contestants import our_contestant
from cllm.bench.embed_cases import CORPUS, RANK32, RANK64, Case
from cllm.bench.harness import Claim, Contestant, contest, interleaved, ratio_of_medians

ROUNDS, STEPS = 7, 12
TABLES = (CORPUS, RANK64, RANK32)

Rates = dict[str, list[float]]
"""Name of a case to its tokens a second, round by round."""


def rates(*, quick: bool) -> Rates:
    """Measure; each begins at random, which decides nothing of the speed."""
    rounds, steps = (2, 2) if quick else (ROUNDS, STEPS)
    shape = ["--steps", str(steps)]
    if quick:
        shape += ["--small", "--set", "train.compile=off", "--set", "train.dtype=fp32"]
    cases = TABLES[:1] if quick else TABLES
    with contest([partial(_start, case, shape) for case in cases]) as contestants:
        figures = interleaved(contestants, rounds)
    return {name: [r["tokens_per_second"] for r in found] for name, found in figures.items()}


def _start(case: Case, shape: list[str]) -> Contestant:
    fields = [("init", "normal"), *case.fields.items()]
    settings = [f"model.embedding.{name}={value}" for name, value in fields]
    arguments = [part for setting in settings for part in ("--set", setting)]
    return our_contestant(case.name, "cllm.bench.training_contestant", ["ours", *arguments, *shape])


def claims(found: Rates, busy: str | None) -> list[Claim]:
    """What is required of the ranks: no fewer tokens a second than the dense table.

    ``busy`` says what keeps the machine busy; only then may ``found`` be empty.
    """
    assert found or busy
    return [
        Claim(
            name=f"tokens/s of {case.name} over dense",
            value=ratio_of_medians(found[case.name], found[CORPUS.name]) if found else None,
            required=1.0,
            judged=not busy,
            why=busy or "",
        )
        for case in (RANK64, RANK32)
    ]
