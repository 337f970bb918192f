"""``cllm bench attention``: explicit matrix products against torch's fused kernel, by context.

The table behind ``train.attention = "auto"`` (``cllm.training.choose``): the demo's model, 2,048 tokens
a step, compiled and eager, in the precision that this machine would choose.
"""

from __future__ import annotations

import os
from functools import partial
from statistics import median

from cllm.bench.harness import Contestant, Options, Result, contest, interleaved, load_now
from cllm.core.cpu import is_busy
from cllm.core.threads import spin_briefly

CONTEXTS = (128, 512, 1024)
TOKENS = 2048
ROUNDS, STEPS = 5, 6


def run(options: Options) -> Result:
    """Measure; no claim is made, the default takes the winner."""
    load, busy = load_now(), is_busy()
    rounds, steps = (1, 1) if options.quick else (ROUNDS, STEPS)
    rows = []
    for context in CONTEXTS[:1] if options.quick else CONTEXTS:
        for compiled in ("off",) if options.quick else ("on", "off"):
            rates = _rates(context, compiled, rounds, steps)
            rows.append(
                {
                    "context": context,
                    "compiled": compiled,
                    "matmul, tokens/s": round(rates["matmul"]),
                    "sdpa, tokens/s": round(rates["sdpa"]),
                    "matmul ÷ sdpa": round(rates["matmul"] / rates["sdpa"], 2),
                }
            )
    notes = [f"Medians of {rounds} interleaved rounds of {steps} steps of {TOKENS:,} tokens."]
    return Result(
        bench="attention", rows=rows, claims=[], notes=notes, load_before=load, busy=busy or ""
    )


def _rates(context: int, compiled: str, rounds: int, steps: int) -> dict[str, float]:
    """Tokens a second of both paths."""
    env = dict(os.environ)
    spin_briefly(env)
    starts = []
    for path in ("matmul", "sdpa"):
        settings = {
            "model.context": context,
            "train.batch_size": TOKENS // context,
            "train.compile": compiled,
            "train.attention": path,
        }
        arguments = ["ours", "--steps", str(steps)]
        for key, value in settings.items():
            arguments += ["--set", f"{key}={value}"]
        module = "cllm.bench.training_contestant"
        starts.append(partial(Contestant, path, module, arguments, env))
    with contest(starts) as contestants:
        figures = interleaved(contestants, rounds)
    return {name: median(r["tokens_per_second"] for r in found) for name, found in figures.items()}
