"""What ends a step, over one arena and over torch's list of parameters: a part of ``cllm bench parallel``.

Clipping, the non-finite check and AdamW, of given gradients, at the demo's size and at some 15 million
parameters. The peer is what a careful loop would use: ``clip_grad_norm_(foreach=True)`` and
``AdamW(fused=True)``.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from cllm.bench.contestants import our_contestant
from cllm.bench.harness import (
    Claim,
    Contestant,
    contest,
    interleaved,
    ratio_of_medians,
)
from cllm.core.cpu import usable_threads

ROUNDS = 9
SIZES = {"tiny": (1.5, "the demo's size"), "small": (1.15, "15 M parameters")}
"""Preset to how many times as fast as torch ours must be, and its name."""
OURS, THEIRS = "arena", "torch, fused AdamW and foreach clipping"


def measure(quick: bool, why: str) -> tuple[list[dict[str, Any]], list[Claim], list[str]]:
    """Rows, claims and notes; ``why`` says why nothing may be judged, if so."""
    rows, claims, cores = [], [], usable_threads()
    for preset, (required, size) in [("nano", (1.0, "a small size"))] if quick else SIZES.items():
        wanted = {
            (name, threads): (who, threads)
            for name, who in ((THEIRS, "torch"), (OURS, "ours"))
            for threads in sorted({1, cores}, reverse=True)
            if threads == 1 or not quick
        }
        starts = [
            partial(_start, f"{name}, threads: {threads}", who, threads, preset)
            for (name, _), (who, threads) in wanted.items()
        ]
        with contest(starts) as contestants:
            found = interleaved(contestants, 2 if quick else ROUNDS)
            parameters = contestants[0].ready["parameters"]
        figures = dict(zip(wanted, found.values(), strict=True))
        seconds = {key: [r["seconds"] for r in measured] for key, measured in figures.items()}
        peak = {key: measured[-1]["peak_rss"] for key, measured in figures.items()}
        for name, threads in wanted:
            own = seconds[name, threads]
            rows.append(
                {
                    "contestant": f"end of a step: {name}",
                    "parameters": parameters,
                    "threads": threads,
                    "µs": round(1e6 * median(own)),
                    "÷ torch": round(ratio_of_medians(seconds[THEIRS, threads], own), 2),
                    "peak RSS, MB": round(peak[name, threads] / 1e6),
                }
            )
        threads = 1 if quick else cores
        gain = ratio_of_medians(seconds[THEIRS, threads], seconds[OURS, threads])
        memory = peak[OURS, threads] / peak[THEIRS, threads]
        claims += [
            Claim(
                name=f"end of a step at {size}: {what}",
                value=round(value, 3),
                required=bound,
                higher_is_better=higher,
                why=why,
                judged=not why,
            )
            for what, value, bound, higher in (
                ("torch's time ÷ the arena's", gain, required, True),
                ("peak RSS ÷ torch's", memory, 1.0, False),
            )
        ]
    notes = [
        "The end of a step is its norm, the non-finite check, clipping at 1 and AdamW, on gradients that "
        f"are there already; medians of {ROUNDS} interleaved rounds. Claims are on {cores} threads."
    ]
    return rows, claims, notes


def _start(name: str, who: str, threads: int, preset: str) -> Contestant:
    call = [who, "--threads", str(threads), "--preset", preset]
    return our_contestant(name, "cllm.bench.arena_contestant", call)
