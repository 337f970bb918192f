"""Measures what processes of this machine send each other over gloo, as those of torchrun do.

``python -m cllm.training.plan.link_probe`` reads one JSON request (``number``, ``processes``, ``cores`` to
keep to, and ``store``, a file for all of them) and prints one JSON answer: ``link``, the bytes a second
that a process sends to its neighbour in a ring while it receives as many, and ``latency``, the seconds of
an empty exchange.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

from cllm.core.torchrun import leave

LARGE, SMALL = 2**24, 8
"""Bytes of a message whose time is its bytes', and of one whose time is the latency."""
ROUNDS = 15


def main() -> None:
    """Answer the request."""
    asked = json.loads(sys.stdin.readline())
    if asked["cores"]:
        os.sched_setaffinity(0, asked["cores"])
    number, processes = asked["number"], asked["processes"]
    torch.set_num_threads(1)
    store = dist.FileStore(asked["store"], processes)
    dist.init_process_group("gloo", store=store, rank=number, world_size=processes)
    latency = exchange_seconds(number, processes, SMALL)
    whole = exchange_seconds(number, processes, LARGE)
    print(json.dumps({"latency": latency, "link": LARGE / max(whole - latency, 1e-9)}), flush=True)
    leave(0)


def exchange_seconds(number: int, processes: int, size: int) -> float:
    """The median time in which each sends ``size`` bytes to the next in a ring, the slowest's."""
    out, into = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    taken: list[float] = []
    for _ in range(ROUNDS):
        dist.barrier()
        begin = time.perf_counter()
        _exchange(number, processes, out, into)
        slowest = torch.tensor(time.perf_counter() - begin)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        taken.append(float(slowest))
    return sorted(taken)[ROUNDS // 2]


def _exchange(number: int, processes: int, out: Tensor, into: Tensor) -> None:
    sending = dist.isend(out, (number + 1) % processes)
    receiving = dist.irecv(into, (number - 1) % processes)
    for work in (sending, receiving):
        assert work is not None
        work.wait()


if __name__ == "__main__":
    main()
