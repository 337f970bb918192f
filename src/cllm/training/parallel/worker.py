"""A worker's process: its share of each step, and of the step's end, for as long as the parent is there.

``python -m cllm.training.parallel.worker SOCKET MEMORY NUMBER`` with inherited file descriptors.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterable
from contextlib import suppress

from cllm.core.threads import spin_briefly
from cllm.training.parallel import wire


def main(arguments: list[str]) -> None:
    """Serve the parent until its end of the socket closes. (Signals to the group are the parent's.)"""
    socket_fd, memory_fd, number = map(int, arguments)
    spin_briefly()
    sock = socket.socket(fileno=socket_fd)
    threading.Thread(target=_end_with_the_parent, args=[sock], daemon=True).start()
    try:
        facts = wire.receive_facts(sock)
        _serve(sock, memory_fd, number, facts)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _end_with_the_parent(sock: socket.socket) -> None:
    """Be gone as soon as the parent is, in the middle of a long step or of compiling, too."""
    wire.is_closed(sock, None)
    os._exit(0)


def _serve(sock: socket.socket, memory_fd: int, number: int, facts: dict[str, object]) -> None:
    import torch

    from cllm.core.config import Config
    from cllm.core.shared_memory import SharedMemory
    from cllm.training.build import build_step
    from cllm.training.gradient import Micro
    from cllm.training.parallel.ending import Ending
    from cllm.training.parallel.shards import deal
    from cllm.training.parallel.shared import Shared

    if facts["double"]:
        torch.set_default_dtype(torch.float64)
    config = Config.model_validate(facts["config"])
    size, workers = facts["size"], config.train.parallel.workers
    assert isinstance(size, int)
    assert isinstance(workers, int)
    memory = SharedMemory(memory_fd, size)
    model, step = build_step(config, memory, owner=False)
    shared = Shared(memory, config, step.arena, step.cores)
    step.arena.grad = shared.grads[number]
    step.cores.update(shared.cores)
    buffers = shared.buffers(model)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    for table in model.tables.values():
        if table.incidence is not None:
            table.incidence.transpose()
    model.train()
    cores = facts["cores"]
    assert isinstance(cores, list)
    shards = deal(config.train.batch_size, config.train.accumulate, workers)[number]
    ending = Ending(step.update, shared, number)

    def obey(what: int, scale: float, lr: float, integer: int) -> float:
        if what == wire.ADD_UP:
            ending.add_up()
        elif what == wire.UPDATE:
            ending.apply(scale, lr, integer)
        else:
            torch.manual_seed(integer)
            micros = [Micro(ids, targets) for ids, targets in shared.share(shards)]
            return step.accumulate(micros, len(micros), scale)
        return 0.0

    while True:
        order = wire.ORDER.unpack(wire.receive(sock, wire.ORDER.size))
        try:
            loss = obey(*order)
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}".encode()
            sock.sendall(wire.ANSWER.pack(False, float(len(text))) + text)
            raise SystemExit(1) from error
        sock.sendall(wire.ANSWER.pack(True, loss))
        if cores:  # not before what is compiled in the first step has taken as many as it can
            _pin(cores)
            cores = []


def _pin(cores: Iterable[int]) -> None:
    """Have all threads of this process stay on ``cores``."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


if __name__ == "__main__":
    main(sys.argv[1:])
