"""``cllm bench parallel``: workers beside one process with one thread, and with a team of threads.

The demo's model and batch, each contestant in a process of its own, first on an idle machine, then beside
another program that wants one core. One worker on one core beside a team of threads that waits for its
slowest member at every operation: that is what the comparison is about. Then what ends a step, over one
arena (``cllm.bench.arena``), or updates within the backward pass (``cllm.bench.early``), what is done
beside the steps (``cllm.bench.overlap``), what processes of torchrun send (``cllm.bench.traffic``), and
what the delay costs (``cllm.bench.delay``; its text may be given with ``--data``).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

from cllm.bench import arena, delay, early, overlap, traffic
from cllm.bench.contestants import SideBySide, our_contestant
from cllm.bench.harness import (
    Claim,
    Contestant,
    Options,
    Result,
    contest,
    interleaved,
    load_now,
    ratio_of_medians,
    spread,
)
from cllm.core.config import Config
from cllm.core.cpu import is_busy, usable_threads
from cllm.core.errors import UserError
from cllm.training.parallel.shards import most_workers

ROUNDS, STEPS = 15, 10
ONE = "one process, one thread"
DELAYED = "delayed pipeline, three threads"
TAKES = frozenset({"data"})
COMPETITOR = "x = 0\nwhile True: x += 1"


def run(options: Options) -> Result:
    """Measure. Raises ``UserError`` where there is one core."""
    cores, load, busy = usable_threads(), load_now(), is_busy()
    if cores < 2:
        raise UserError("there is one core here, and workers need two: nothing to measure")
    train = Config().train
    workers = most_workers(train.batch_size, train.accumulate, cores)
    team, crew = f"one process, {cores} threads", f"{workers} workers of one thread"
    apart = f"{cores} runs of one thread, nothing in common"
    settings = {
        ONE: ["train.threads=1"],
        team: [f"train.threads={cores}"],
        crew: [f"train.parallel.workers={workers}"],
        DELAYED: ["train.pipeline.mode=delayed"],
    }
    rounds, steps = (2, 2) if options.quick else (ROUNDS, STEPS)
    starts = [partial(_start, name, call, steps, options.quick) for name, call in settings.items()]
    alone = partial(_start, "another run", ["train.threads=1"], steps, options.quick)
    with contest(starts) as contestants, contest([alone] * (cores - 1)) as others:
        runs = SideBySide(apart, [contestants[0], *others])
        idle = interleaved([*contestants, runs], rounds)
        with _competitor():
            beside = interleaved(contestants, rounds)
    figures = {"idle": idle, "beside another program": beside}
    rates = {
        state: {name: [r["tokens_per_second"] for r in found] for name, found in measured.items()}
        for state, measured in figures.items()
    }
    rows = [
        {
            "machine": state,
            "contestant": name,
            "tokens/s": round(median(values)),
            "lowest–highest": spread(values),
            "÷ one thread": round(ratio_of_medians(values, rates["idle"][ONE]), 2),
            "peak RSS, MB": round(figures[state][name][-1]["peak_rss"] / 1e6),
        }
        for state, found in rates.items()
        for name, values in found.items()
    ]
    why = "--quick measures nothing" if options.quick else (busy or "")
    ends, end_claims, end_notes = arena.measure(options.quick, why)
    beside_steps, beside_notes = overlap.measure(options.quick)
    updates, update_claims = early.measure(options.quick, why, rounds, steps)
    sent, sent_claims, sent_notes = traffic.measure(options.quick, why)
    quality, quality_notes = delay.measure(options.quick, options.data)
    return Result(
        bench="parallel",
        rows=rows + updates + quality + ends + beside_steps + sent,
        claims=[
            *_claims(rates, cores, workers, team, crew, apart, why),
            *update_claims,
            *end_claims,
            *sent_claims,
        ],
        notes=[
            f"Shape and batch: {contestants[0].ready['shape']}; {contestants[0].ready['dtype']}. Medians "
            f"of {rounds} interleaved rounds of {steps} steps, compilation and warm-up apart. Workers take "
            "a share of the batch's windows each. Peak RSS is the parent's.",
            "The delayed pipeline would be the default from 1.1 times the plain loop on, at equal bits per "
            "byte; it is off. Its rounds begin and end drained, as at a checkpoint.",
            f"{apart[0].upper()}{apart[1:]}: {cores} trainings at the same time, their tokens added up. "
            "Workers that wait for each other at every step are not expected to give more: this bounds "
            "what they can gain on this machine, and divided by the team's what they can gain over it.",
            *quality_notes,
            *beside_notes,
            "The other program counts in a loop. The fair share of n threads of ours beside it on c cores "
            f"is c·n/(n + 1), and n at most; c is {cores} here. As many workers begin as there are "
            f"cores, or as the batch divides among: {workers}.",
            *end_notes,
            *sent_notes,
        ],
        packages=("torch",),
        load_before=load,
        busy=busy or "",
        headline=[
            {"training": name, "tokens/s": round(median(rates["idle"][name]))}
            | {"beside another program": round(median(rates["beside another program"][name]))}
            for name in settings
        ],
    )


def _claims(
    rates: dict[str, dict[str, list[float]]],
    cores: int,
    workers: int,
    team: str,
    crew: str,
    apart: str,
    why: str,
) -> list[Claim]:
    idle, beside = rates["idle"], rates["beside another program"]
    wanted: list[tuple[str, float, float | None, float | None]] = [
        (f"{crew} ÷ {ONE}", ratio_of_medians(idle[crew], idle[ONE]), 1.85, 1.95),
        (f"{crew} ÷ {team}", ratio_of_medians(idle[crew], idle[team]), 1.1, None),
        (f"{apart} ÷ {ONE}", ratio_of_medians(idle[apart], idle[ONE]), None, None),
        (f"{apart} ÷ {team}", ratio_of_medians(idle[apart], idle[team]), None, None),
        (f"{crew} ÷ {apart}", ratio_of_medians(idle[crew], idle[apart]), None, None),
        (f"{DELAYED} ÷ {team}", ratio_of_medians(idle[DELAYED], idle[team]), None, 1.1),
    ]
    for name, count, required in ((crew, workers, 0.6), (team, cores, None)):
        share = min(1.0, cores / (count + 1))  # of what they have alone
        kept = ratio_of_medians(beside[name], idle[name]) / share
        wanted.append((f"{name}, beside another program: of the fair share", kept, required, None))
    claims = []
    for name, value, required, aim in wanted:
        # The figures were set for two cores.
        judged = not why and (cores == 2 or required != 1.85)
        reason = why or ("" if judged else "set for two cores")
        if required is None:
            reason = reason or "shown beside"
        claims.append(
            Claim(
                name=name,
                value=round(value, 3),
                required=required,
                aim=aim,
                why=reason,
                judged=judged and required is not None,
            )
        )
    return claims


@contextmanager
def _competitor() -> Iterator[None]:
    """Another program that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", COMPETITOR])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _start(name: str, settings: list[str], steps: int, small: bool) -> Contestant:
    call = [
        "ours",
        "--bare",
        "--steps",
        str(steps),
        *(["--small", "--set", "train.compile=off", "--set", "train.dtype=fp32"] if small else []),
    ]
    for setting in settings:
        call += ["--set", setting]
    return our_contestant(name, "cllm.bench.training_contestant", call)
