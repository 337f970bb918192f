"""Which weights are the fastest here, by measurement and not by rule."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch

from cllm.core.cpu import is_busy
from cllm.core.errors import UsageError
from cllm.core.measurements import recall, remember
from cllm.core.model_config import ModelConfig
from cllm.infer.engine import Engine, EngineOptions

CHOICES: tuple[str, ...] = ("fp32", "bf16", "int8")
"""Kinds that ``auto`` chooses among: int4 and 8-bit activations cost quality, and are for asking."""
STORED: tuple[str, ...] = (*CHOICES, "int4")
"""The same for a file of integers, which costs none where they are taken as they are."""
STEPS = 12


def fastest_weights(
    shape: ModelConfig,
    options: EngineOptions,
    ready: Callable[[EngineOptions], Engine],
    how: str,
    choices: Sequence[str] = CHOICES,
) -> tuple[str, str]:
    """The kind among ``choices`` with which engines that ``ready`` makes take a step soonest, and a line
    with the figures.

    ``options`` say all but the kind, ``how`` names what else decides (what is compiled, what a file holds):
    measured once for these, a machine, torch version, number of threads and shape of model (each time
    anew while other programs keep the machine busy). A kind that the weights do not fit is left out.
    """
    facts = [shape.model_dump_json(), options.cache, how]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    name, threads = f"decode-{key}-{options.slots}", torch.get_num_threads()
    seconds = recall(name, threads=threads)
    if not isinstance(seconds, dict) or set(seconds) - set(choices) or not seconds:
        seconds = {}
        for kind in choices:
            try:
                seconds[kind] = _step_seconds(ready(replace(options, weights=kind)))
            except UsageError:  # its matrices do not fit this kind
                continue
        if not is_busy(threads):
            remember(name, seconds, threads=threads)
    best = min(seconds, key=lambda kind: seconds[kind])
    figures = ", ".join(f"{kind} {1e3 * seconds[kind]:.2f} ms" for kind in seconds)
    return best, f"weights {best}: measured for a step of {options.slots} here: {figures}"


def _step_seconds(engine: Engine) -> float:
    slots = range(engine.options.slots)
    for slot in slots:
        engine.start(slot, [0])
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        engine.step(dict.fromkeys(slots, 0))
        times.append(time.perf_counter() - begin)
    return median(times[2:])
