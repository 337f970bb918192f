"""What processes of torchrun send each other, beside what ``cllm plan`` foretells: a part of ``cllm bench
parallel``.

Two processes over gloo on this machine train with DDP, FSDP2 and layer stages. Bytes are those that the
system counts for the connections of the process that sends most; seconds are those of the collectives.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

from cllm.bench.contestants import our_contestant
from cllm.bench.harness import Claim, Contestant, contest, interleaved
from cllm.core.config import Config
from cllm.core.measurements import afresh
from cllm.core.settings import merge, parse_setting
from cllm.training.choose import choose
from cllm.training.plan.estimate import Estimate
from cllm.training.plan.here import by_processes

ROUNDS, STEPS, PROCESSES = 9, 3, 2
WITHIN = 0.3
"""Share by which a forecast may be off."""
STRATEGIES = {
    "DDP": ["train.parallel.strategy=ddp"],
    "FSDP": ["train.parallel.strategy=fsdp"],
    "stages": ["train.pipeline.mode=stages", "train.pipeline.schedule=1f1b"],
}
SIZES = {
    "tiny": ["model.preset=tiny"],
    "mini, batch 2": ["model.preset=mini", "train.batch_size=2"],
}
BASE = [
    *("model.vocab_size=4096", "train.steps=100000", "train.device=cpu", "train.threads=1"),
    *("train.compile=off", "train.dtype=fp32", "train.lazy_rows=off"),
]
SENT, SENDING, STEP = "MB sent in a step", "ms of communication in a step", "ms of a step"


def measure(quick: bool, why: str) -> tuple[list[dict[str, Any]], list[Claim], list[str]]:
    """Rows, claims and notes; ``why`` says why no time may be judged, if so."""
    if sys.platform != "linux":
        return [], [], ["What processes of torchrun send is counted on Linux only."]
    rows: list[dict[str, Any]] = []
    sizes = {"nano": ["model.preset=nano"]} if quick else SIZES
    for size, settings in sizes.items():
        calls = {name: [*BASE, *settings, *own] for name, own in STRATEGIES.items()}
        with afresh():
            foretold = {name: _forecast(settings, own) for name, own in STRATEGIES.items()}
        starts = [
            partial(_start, name, 2 if quick else STEPS, call) for name, call in calls.items()
        ]
        with contest(starts) as contestants:
            found = interleaved(contestants, 1 if quick else ROUNDS)
        for name, rounds in found.items():
            rows += compare(f"{name}, {size}", name, rounds, foretold[name])
    return rows, claims_of(rows, "--quick measures nothing" if quick else "", why), [_note()]


def compare(
    label: str, strategy: str, rounds: Sequence[dict[str, Any]], foretold: Estimate
) -> list[dict[str, Any]]:
    """Rows of a strategy: each figure measured and foretold."""
    figures = [
        (SENT, 1e-6, median(r["sent"] for r in rounds), foretold.sent),
        (STEP, 1e3, median(r["seconds"] for r in rounds), foretold.seconds),
    ]
    if strategy != "stages":  # they send while they compute
        steps = [step for r in rounds for step in r["collectives"]]
        # Each one's median: of sums, one that the system interrupts would spoil most.
        sending = sum(median(seconds) for seconds in zip(*steps, strict=True))
        figures.insert(1, (SENDING, 1e3, sending, foretold.communication))
    rows = []
    for what, factor, measured, forecast in figures:
        rows.append(
            {
                "contestant": f"{label}: {what}",
                "measured": round(factor * measured, 2),
                "forecast": round(factor * forecast, 2),
                "forecast ÷ measured": round(forecast / measured, 3),
            }
        )
    return rows


def claims_of(rows: Sequence[dict[str, Any]], quick: str, busy: str) -> list[Claim]:
    """The worst forecast of each kind. Bytes are the same on a busy machine."""
    claims = []
    for what, why in ((SENT, quick), (SENDING, quick or busy), (STEP, quick or busy)):
        mine = [row for row in rows if row["contestant"].endswith(f": {what}")]
        claims.append(
            Claim(
                name=f"two processes of torchrun, {what}: largest error of the forecast",
                value=round(max(abs(row["forecast ÷ measured"] - 1) for row in mine), 3),
                required=WITHIN,
                higher_is_better=False,
                why=why,
                judged=not why,
            )
        )
    return claims


def _forecast(settings: Sequence[str], strategy: Sequence[str]) -> Estimate:
    asked = merge(Config(), dict(map(parse_setting, (*BASE, *settings))))
    # Resolved as for one process: stages are refused where torchrun did not start this one.
    config = choose(asked).config.replace(**dict(map(parse_setting, strategy)))
    return by_processes(config, PROCESSES, lambda text: None)


def _start(name: str, steps: int, settings: Sequence[str]) -> Contestant:
    options = ["--standalone", "--nproc-per-node", str(PROCESSES)]
    call = [*options, "-m", "cllm.bench.traffic_contestant", str(steps), *settings]
    return our_contestant(name, "torch.distributed.run", call)


def _note() -> str:
    return (
        f"DDP, FSDP and stages: {PROCESSES} processes of torchrun with one thread each, uncompiled, beside "
        f"the forecast of `cllm plan`, whose constants were measured just before; medians of {ROUNDS} "
        f"interleaved rounds of {STEPS} steps. Bytes are what the TCP connections of the process that "
        "sends most have sent, without headers. Of each "
        "collective that torch's profiler sees, time counts from when the last process begins it to when "
        "the last has ended it, so that no waiting for a process that still computes is in it (nor the "
        "waking up of who waits); a step's communication is the sum of their medians, and none of them "
        "overlaps with arithmetic. Stages send while they compute, so that only their bytes and steps are "
        "compared. Vocabulary 4,096, float32."
    )
