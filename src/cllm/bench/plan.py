"""``cllm bench plan``: what `cllm plan` foretells beside what is then measured.

Models of several sizes and batches train for some steps, each in a process of its own as `cllm train` would
run it; time of a step and peak memory stand beside the forecast, which knows the machine's constants and
nothing of these runs.
"""

from __future__ import annotations

import os
from functools import partial
from statistics import median
from typing import Any

from cllm.bench.harness import Claim, Contestant, Options, Result, contest, interleaved, load_now
from cllm.core.config import Config
from cllm.core.cpu import is_busy, usable_threads
from cllm.core.measurements import afresh
from cllm.core.settings import merge, parse_setting
from cllm.core.threads import spin_briefly
from cllm.training.choose import choose
from cllm.training.plan.here import constants_of
from cllm.training.plan.strategies import first_worker_bytes, one_process, workers

ROUNDS, STEPS = 9, 4
WITHIN = 0.3
"""Share by which a forecast may be off."""
EAGER, COMPILED = "train.compile=off", "train.compile=on"
CASES = {
    "nano": ["model.preset=nano", EAGER],
    "nano, batch 64": ["model.preset=nano", "train.batch_size=64", EAGER],
    "tiny": ["model.preset=tiny", EAGER],
    "mini, batch 4": ["model.preset=mini", "train.batch_size=4", EAGER],
    "nano, compiled": ["model.preset=nano", COMPILED],
    "tiny, compiled": ["model.preset=tiny", COMPILED],
}
WAYS = {
    "one thread": ["train.threads=1"],
    "two threads": ["train.threads=2"],
    "two workers": ["train.threads=1", "train.parallel.workers=2"],
}
BASE: dict[str, Any] = {
    "model.vocab_size": 4096,
    "train.steps": 100_000,
    "train.device": "cpu",
    "train.lazy_rows": "off",
}


def run(options: Options) -> Result:
    """Foretell and measure. Two threads and two workers need two cores."""
    load, busy = load_now(), is_busy()
    cases = {"nano": CASES["nano"]} if options.quick else CASES
    ways = dict(list(WAYS.items())[:1]) if options.quick or usable_threads() < 2 else WAYS
    rows = [
        _row(case, way, [*settings, *threads], options.quick)
        for case, settings in cases.items()
        for way, threads in ways.items()
    ]
    why = "--quick measures nothing" if options.quick else (busy or "")
    claims = [
        Claim(
            name=f"largest error of a forecast of {what}",
            value=round(max(abs(row[column] - 1) for row in rows), 3),
            required=WITHIN,
            higher_is_better=False,
            why=why,
            judged=not why,
        )
        for what, column in (("a step's time", "time ratio"), ("peak memory", "memory ratio"))
    ]
    return Result(
        bench="plan",
        rows=rows,
        claims=claims,
        notes=[
            "Ratios are forecast ÷ measurement. Vocabulary 4,096; batch 16 where nothing is said. Medians "
            f"of {ROUNDS} rounds of {STEPS} steps after warm-up. Memory is the peak of the resident set of "
            "the process that trains; of workers, the parent's. The machine's constants are "
            "measured before each row.",
        ],
        load_before=load,
        busy=busy or "",
    )


def forecast(config: Config) -> tuple[float, float]:
    """(seconds of a step, bytes of the process that trains) of a resolved configuration on this machine."""
    known = constants_of(config, lambda text: None)
    if config.train.parallel.workers == 1:
        found = one_process(config, known, None)
        return found.seconds, found.memory.total
    return workers(config, known, None).seconds, first_worker_bytes(config, known)


def _row(case: str, way: str, settings: list[str], quick: bool) -> dict[str, Any]:
    config = choose(merge(Config(), BASE | dict(map(parse_setting, settings)))).config
    with afresh():  # a shared machine is another one some minutes later
        seconds, memory = forecast(config)
    env = dict(os.environ)
    spin_briefly(env)
    call = ["ours", "--steps", "2" if quick else str(STEPS)]
    for setting in (*settings, "train.lazy_rows=off", "train.device=cpu"):
        call += ["--set", setting]
    start = partial(Contestant, case, "cllm.bench.training_contestant", call, env)
    with contest([start]) as contestants:
        found = interleaved(contestants, 1 if quick else ROUNDS)[case]
    tokens = config.train.batch_size * config.model.context
    measured = tokens / median(r["tokens_per_second"] for r in found)
    peak = found[-1]["peak_rss"]
    return {
        "model": case,
        "by": way,
        "step, ms": round(1000 * seconds, 1),
        "measured, ms": round(1000 * measured, 1),
        "time ratio": round(seconds / measured, 2),
        "memory, MB": round(memory / 1e6),
        "measured, MB": round(peak / 1e6),
        "memory ratio": round(memory / peak, 2),
    }
