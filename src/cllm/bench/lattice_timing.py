"""Timing in one process: contestants take turns, so that what the machine does falls on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

# Rounds of every comparison, its warm-up apart.
ROUNDS = 5


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch on ``count`` threads inside the block, whatever the environment asked for."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def medians(contestants: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each contestant over ``rounds`` interleaved rounds, warm-up apart."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, call in contestants.items():
            started = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


def row(
    job: str,
    case: str,
    value: float | None,
    unit: str,
    peer: str | None = None,
    peer_value: float | None = None,
) -> dict[str, Any]:
    """One line of the bench's table; ``peer_value`` is in the same unit."""
    return {
        "job": job,
        "case": case,
        "value": value,
        "unit": unit,
        "peer": peer,
        "peer value": peer_value,
    }
