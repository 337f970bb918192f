"""Which weights are the fastest here, by measurement and not by rule."""

from __future__ import annotations

import hashlib
import time
from statistics import median

import torch

from cllm.core.cpu import is_busy
from cllm.core.errors import UsageError
from cllm.core.measurements import recall, remember
from cllm.infer.engine import Engine, EngineOptions
from cllm.model.transformer import Transformer

CHOICES = ("fp32", "bf16", "int8")
"""Kinds that ``auto`` chooses among: int4 and 8-bit activations cost quality, and are for asking."""
STEPS = 12


def fastest_weights(model: Transformer, slots: int) -> tuple[str, str]:
    """The fastest kind for decoding with ``slots`` at once, and a line that tells the figures.

    The step is measured as it runs without compilation, once for a machine, torch version, number of
    threads and shape of model (each time anew while other programs keep the machine busy).
    """
    shape = hashlib.sha256(model.config.model_dump_json().encode()).hexdigest()[:12]
    name, threads = f"decode-{shape}-{slots}", torch.get_num_threads()
    seconds = recall(name, threads=threads)
    if not isinstance(seconds, dict) or set(seconds) - set(CHOICES) or not seconds:
        seconds = {}
        for kind in CHOICES:
            try:
                seconds[kind] = _step_seconds(model, EngineOptions(slots=slots, weights=kind))
            except UsageError:  # its matrices do not fit this kind
                continue
        if not is_busy(threads):
            remember(name, seconds, threads=threads)
    best = min(seconds, key=lambda kind: seconds[kind])
    figures = ", ".join(f"{kind} {1e3 * seconds[kind]:.2f} ms" for kind in seconds)
    return best, f"weights {best}: measured for a step of {slots} here: {figures}"


def _step_seconds(model: Transformer, options: EngineOptions) -> float:
    engine = Engine(model, options)
    for slot in range(options.slots):
        engine.start(slot, [0])
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        engine.step(dict.fromkeys(range(options.slots), 0))
        times.append(time.perf_counter() - begin)
    return median(times[2:])
