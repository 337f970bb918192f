"""Measures what processes of this machine send each other over gloo, as those of torchrun do.

``python -m cllm.training.plan.link_probe`` reads one JSON request (``number``, ``processes``, and
``store``, a file for all of them) and prints one JSON answer: for each way of sending the seconds of so
many bytes, ascending. ``exchange``: each sends them to the next in a ring; ``all_reduce``: they are summed
everywhere; ``all_gather``: each ends up with so many, its own share among them. What a library does beside
the sending (copies, sums) is in them. The system places the processes, as it does those of torchrun.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from cllm.core.allocator import keep_freed_memory
from cllm.core.torchrun import leave

SIZES = (2**6, 2**16, 2**20, 2**22, 2**24)
"""Bytes of the messages that are measured, multiples of four times as many as processes."""
ROUNDS = 25
Call = tuple[str, int]
"""A way of sending, and bytes."""
OTHER = 2**25
"""Bytes that are touched between two messages, as a step's arithmetic does: what is sent is not near."""


def main() -> None:
    """Answer the request."""
    asked = json.loads(sys.stdin.readline())
    number, processes = asked["number"], asked["processes"]
    torch.set_num_threads(1)
    keep_freed_memory()  # as in training
    store = dist.FileStore(asked["store"], processes)
    dist.init_process_group("gloo", store=store, rank=number, world_size=processes)
    sizes = [size - size % (4 * processes) for size in SIZES]
    calls = {
        (name, size): call
        for size in sizes
        for name, call in _calls(number, processes, size).items()
    }
    found: dict[str, list[tuple[int, float]]] = {}
    for (name, size), seconds in seconds_of(calls).items():
        found.setdefault(name, []).append((size, seconds))
    print(json.dumps(found), flush=True)
    leave(0)


def seconds_of(calls: Mapping[Call, Callable[[], object]]) -> dict[Call, float]:
    """The median time of each from when the last process begins it until the last is done. They take turns,
    so that a second in which the machine is slow spoils a few times of each and not all times of one."""
    other = torch.ones(OTHER // 4)
    taken: dict[Call, list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            other.add_(1.0)
            dist.barrier()
            begin = time.perf_counter()
            call()
            # One clock for all processes of a machine.
            ends = torch.tensor([begin, time.perf_counter()], dtype=torch.float64)
            dist.all_reduce(ends, dist.ReduceOp.MAX)
            taken[key].append(float(ends[1] - ends[0]))
    return {key: sorted(times)[ROUNDS // 2] for key, times in taken.items()}


def _calls(number: int, processes: int, size: int) -> dict[str, Callable[[], object]]:
    whole, into = torch.zeros(size // 4), torch.zeros(size // 4)
    share = torch.zeros(size // 4 // processes)
    return {
        "exchange": partial(_exchange, number, processes, whole, into),
        "all_reduce": partial(dist.all_reduce, whole),
        "all_gather": partial(dist.all_gather_into_tensor, into, share),
    }


def _exchange(number: int, processes: int, out: Tensor, into: Tensor) -> None:
    sending = dist.isend(out, (number + 1) % processes)
    receiving = dist.irecv(into, (number - 1) % processes)
    for work in (sending, receiving):
        assert work is not None
        work.wait()


if __name__ == "__main__":
    main()
