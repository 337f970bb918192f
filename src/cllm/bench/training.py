"""``cllm bench train``: speed of training beside transformers' Llama of exactly the same shape.

Contestants, each in its own process (``cllm.bench.training_contestant``): (a) the peer's plain eager
loop in fp32, (b) the same compiled in bf16 with SDPA (in fp32 where bf16 is the slower one), (c) as (b)
with explicit attention, and ours as ``cllm train`` would choose on this machine; then ours with one choice
changed at a time, and at the vector widths that ATen and Inductor can be held to.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from statistics import median
from typing import Any

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
from cllm.core.errors import require
from cllm.core.machine import machine
from cllm.core.threads import spin_briefly
from cllm.training.parallel.shards import most_workers

ROUNDS, STEPS = 7, 12
STRONGEST = "(c) Llama, compiled {low}, eager attention"
PEERS = {
    "(a) Llama, eager fp32": "peer --attention sdpa --dtype fp32",
    "(b) Llama, compiled {low}, SDPA": "peer --attention sdpa --dtype {low} --compile",
    STRONGEST: "peer --attention eager --dtype {low} --compile",
}
"""``low``: the faster precision of this machine, as whoever runs the peer would choose."""
TUNED = {
    "(c) with our memory and waiting": "peer --attention eager --dtype {low} --compile --keep-memory"
}
"""How much of our lead is the allocator and the threads' waiting, which any loop could have."""
OURS = "cllm train"
VARIANTS = {
    OURS: "ours",
    "cllm, fp32": "ours --set train.dtype=fp32",
    "cllm, SDPA": "ours --set train.attention=sdpa",
    "cllm, eager": "ours --set train.compile=off",
    "cllm, one thread": "ours --set train.threads=1",
    "cllm, memory given back": "ours --give-memory-back",
}
WORKERS = "cllm, {} workers"
WORKERS_REQUIRED, WORKERS_AIM = 1.3, 1.8
"""Speed of as many workers as there are cores (and the batch divides among) over that of the strongest
peer."""
VECTORS = {"default": "1", "avx2": "256", "avx512": "512"}
"""ATEN_CPU_CAPABILITY to Inductor's vector width in bits (1: no vectors)."""


def run(options: Options) -> Result:
    """Measure. Raises ``UserError`` if transformers is not installed."""
    require("transformers", "bench", "the peer of `cllm bench train`")
    load = load_now()
    busy = is_busy()
    rounds, steps = (2, 2) if options.quick else (ROUNDS, STEPS)
    shape = ["--steps", str(steps)] + (["--small"] if options.quick else [])
    low = faster_precision()
    peers = {name.format(low=low): call.format(low=low) for name, call in PEERS.items()}
    tuned = {name: call.format(low=low) for name, call in TUNED.items()}
    strongest = STRONGEST.format(low=low)
    wanted = peers | tuned | VARIANTS
    if low == "fp32":
        del wanted["cllm, fp32"]  # that is what ours takes
    cores = usable_threads()
    train = Config().train
    workers = most_workers(train.batch_size, train.accumulate, cores)
    crew = WORKERS.format(workers)
    if workers > 1 and hasattr(os, "memfd_create"):
        wanted[crew] = f"ours --set train.parallel.workers={workers}"
    if options.quick:
        wanted = {name: wanted[name] for name in (strongest, OURS)}
    starts = [partial(_start, name, call, shape) for name, call in wanted.items()]
    if not options.quick:
        for level, bits in VECTORS.items():
            if level in ("default", *machine().instruction_sets):
                call = f"ours --simdlen {bits}"
                starts.append(partial(_start, f"cllm, {level} vectors", call, shape, level))
    with contest(starts) as contestants:
        figures = interleaved(contestants, rounds, say=_say)
    rates = {name: [r["tokens_per_second"] for r in found] for name, found in figures.items()}
    rows = [_row(c, rates[c.name], figures[c.name], rates[strongest]) for c in contestants]
    ours = next(c for c in contestants if c.name == OURS)
    notes = [
        f"Shape and batch: {ours.ready['shape']}. Medians of {rounds} interleaved rounds of {steps} "
        "steps, each contestant in a process of its own; compilation and 5 warm-up steps apart. "
        "`start` is the time from the first step's call to its end: compilation, with a warm cache "
        "where this bench ran before.",
        "This machine's matmul rate for (2048, 128) @ (128, 4096), measured by us: "
        + ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in ours.ready["matmul"].items())
        + ". `share of matmul` is the achieved rate over that of the same precision.",
        "Ours keeps freed memory and lets waiting threads spin briefly (docs/speed.md); the peers run as "
        "a plain script would, and once more, (c), with both of these.",
        "The rows of vector widths hold ATen (ATEN_CPU_CAPABILITY) and Inductor's code to that width; "
        "the products' own libraries still choose for themselves.",
    ]
    return Result(
        bench="train",
        rows=rows,
        claims=_claims(rates, strongest, list(peers), crew, _why(busy, options.quick)),
        notes=notes,
        packages=("torch", "transformers"),
        load_before=load,
        busy=busy or "",
        headline=[
            {key: row[key] for key in ("contestant", "tokens/s", "÷ (c)")}
            for row in rows
            if row["contestant"] in (*peers, *tuned, OURS, crew)
        ],
    )


def faster_precision() -> str:
    """That in which this machine multiplies faster: ``fp32`` or ``bf16``."""
    from cllm.training.choose import matmul_rates

    rates = matmul_rates(usable_threads())
    return max(rates, key=lambda name: rates[name])


def _why(busy: str | None, quick: bool) -> dict[str, str]:
    """By contestant of ours: why its claim may not be judged here, if so."""
    common = "--quick measures nothing" if quick else (busy or "")
    sets = machine().instruction_sets
    amx = any("amx" in name.lower() for name in sets)
    return {
        OURS: common or ("" if amx else "no AMX here, which the requirement was set for"),
        WORKERS: common,
    }


def _claims(
    rates: dict[str, list[float]],
    strongest: str,
    peers: list[str],
    crew: str,
    why: dict[str, str],
) -> list[Claim]:
    wanted: list[tuple[str, str, float | None, float | None, str]] = [
        (OURS, strongest, 1.15, 1.5, why[OURS]),
        *((OURS, name, None, None, why[OURS]) for name in peers if name != strongest),
        (crew, strongest, WORKERS_REQUIRED, WORKERS_AIM, why[WORKERS]),
    ]
    return [
        Claim(
            name=f"{ours} ÷ {peer}",
            value=round(ratio_of_medians(rates[ours], rates[peer]), 3),
            required=required,
            aim=aim,
            why=reason or ("" if required is not None else "no figure is required"),
            judged=not reason,
        )
        for ours, peer, required, aim, reason in wanted
        if ours in rates and peer in rates
    ]


def _start(name: str, call: str, shape: list[str], level: str | None = None) -> Contestant:
    env = dict(os.environ)
    if call.startswith("ours") or "--keep-memory" in call:
        spin_briefly(env)  # as `cllm train` does; the peers keep their plain loop
    if level is not None:
        env["ATEN_CPU_CAPABILITY"] = level
    _say(f"starting {name}")
    return Contestant(name, "cllm.bench.training_contestant", [*call.split(), *shape], env)


def _row(
    contestant: Contestant,
    rates: list[float],
    figures: list[dict[str, Any]],
    strongest: list[float],
) -> dict[str, Any]:
    ready = contestant.ready
    flops = ready["flops_per_token"] * median(rates)
    return {
        "contestant": contestant.name,
        "tokens/s": round(median(rates)),
        "lowest–highest": spread(rates),
        "÷ (c)": round(ratio_of_medians(rates, strongest), 2),
        "GFLOP/s": round(flops / 1e9),
        "share of matmul": round(flops / ready["matmul"][ready["dtype"]], 2),
        "start, s": round(ready["start_seconds"], 1),
        "peak RSS, MB": round(figures[-1]["peak_rss"] / 1e6),
    }


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
