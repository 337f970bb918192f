"""Workers on one machine: processes with gradients of their own over one copy of the weights.

Threads would not do: compiled code holds the interpreter's lock, and two threads were measured to be no
faster than one (``docs/speed.md``). The parent is worker 0 and takes its share like the others; then it
adds up the gradients in the workers' order, and makes the optimizer's step alone. Who is left ends when
another is gone: each sees its socket close.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cllm.core.config import Config
from cllm.core.errors import UserError
from cllm.core.shared_memory import SharedMemory
from cllm.model.transformer import Transformer
from cllm.training.arena import Arena
from cllm.training.parallel import wire
from cllm.training.parallel.shards import Shard, deal

_SEED_STRIDE = 7_919
_PATIENCE = 1.0
"""Seconds that a worker gets to end by itself, which it does when its socket closes."""

Batches = Sequence[tuple[Tensor, Tensor]]


class WorkerError(UserError):
    """A worker ended, or reported an error, in the middle of training."""


def reserve(config: Config) -> SharedMemory:
    """Memory for all that the workers of ``config`` share; more than enough, as what is not used takes
    none."""
    train, shape = config.train, config.model
    assert isinstance(train.parallel.workers, int)
    with torch.device("meta"):
        model = Transformer(shape)
    weights = sum(p.numel() + 64 for p in model.parameters())
    buffers = sum(b.numel() + 64 for b in model.buffers())
    cores = 2 * ((shape.vocab_size or 0) * shape.d_model + 64)
    batches = 2 * train.accumulate * train.batch_size * shape.context
    numbers = (2 + train.parallel.workers) * weights + cores + batches + buffers
    return SharedMemory.create(8 * numbers + 2**20)


class Shared:
    """What parent and workers share, taken in the same order by each: the batch, each worker's gradient,
    the cores that are computed, the model's buffers. (The weights are the arena's.)"""

    def __init__(
        self, memory: SharedMemory, config: Config, arena: Arena, cores: dict[str, Tensor]
    ) -> None:
        train, workers = config.train, config.train.parallel.workers
        assert isinstance(workers, int)
        shape = (2, train.accumulate, train.batch_size, config.model.context)
        self.batch = memory.take(shape, torch.int64)
        self.grads = [memory.take(arena.grad.shape, arena.grad.dtype) for _ in range(workers)]
        self.cores = {
            name: memory.take(core.shape, core.dtype) for name, core in sorted(cores.items())
        }
        self.memory = memory

    def buffers(self, model: Transformer) -> dict[str, Tensor]:
        """Places for the model's buffers; to be asked for once."""
        named = sorted(model.named_buffers())
        return {name: self.memory.take(b.shape, b.dtype) for name, b in named}

    def share(self, shards: Sequence[Shard]) -> list[tuple[Tensor, Tensor]]:
        """(ids, targets) of some shards of the present batch."""
        ids, targets = self.batch
        return [
            (ids[s.micro, s.first : s.last], targets[s.micro, s.first : s.last]) for s in shards
        ]


class Crew:
    """The parent's side. ``begin`` hands a step out, ``results`` gathers what the others computed.

    ``program``: what a worker runs, with its arguments after it.
    """

    program: tuple[str, ...] = (sys.executable, "-m", "cllm.training.parallel.worker")

    def __init__(
        self,
        config: Config,
        memory: SharedMemory,
        model: Transformer,
        arena: Arena,
        cores: dict[str, Tensor],
    ) -> None:
        """Take the shared memory; the workers begin with the first step."""
        self.config, self.model, self.memory = config, model, memory
        train = config.train
        assert isinstance(train.parallel.workers, int)
        self.size = train.parallel.workers
        self.shards = deal(train.batch_size, train.accumulate, self.size)
        self.shared = Shared(memory, config, arena, cores)
        arena.grad = self.shared.grads[0]
        for name, place in self.shared.cores.items():
            place.copy_(cores[name])
            cores[name] = place
        self._buffers = self.shared.buffers(model)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self.when_lost: Callable[[Callable[[], UserError]], None] | None = None
        """Called, by another thread, where a worker is gone and the parent has not seen it within a
        second; what it is given makes the error."""
        self._watcher: threading.Thread | None = None
        self._over = threading.Event()
        self._end: tuple[socket.socket, socket.socket] | None = None
        self._mine: set[int] = set()
        """The cores that this thread is pinned to after the first step, if it is; compiling takes all."""
        self._affinity: set[int] = set()
        """The cores of this thread before it was pinned, as long as it is."""

    def begin(self, batches: Batches, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Hand the step's micro-batches out; gives the parent's own share, one after the other.

        ``scale`` is what the loss is multiplied with. Raises ``WorkerError`` if a worker is gone, and the
        share does so before each micro-batch.
        """
        if not self._processes:
            self._hire()
        ids, targets = self.shared.batch
        for number, (some_ids, some_targets) in enumerate(batches):
            ids[number].copy_(some_ids)
            targets[number].copy_(some_targets)
        seed = torch.initial_seed()
        for number, sock in enumerate(self._sockets, start=1):
            order = wire.ORDER.pack(scale, (seed + _SEED_STRIDE * number) % 2**63)
            try:
                sock.sendall(order)
            except OSError as error:
                raise self._lost(number) from error
        return self._watched(self.shared.share(self.shards[0]))

    def results(self) -> list[tuple[float, Tensor]]:
        """(summed loss, flat gradient) of each other worker, in order; waits for them.

        Raises ``WorkerError`` with what a worker reports, or if it is gone.
        """
        found = [
            (self._answer(number, sock), self.shared.grads[number])
            for number, sock in enumerate(self._sockets, start=1)
        ]
        if self._mine and not self._affinity:
            self._affinity = os.sched_getaffinity(0)
            os.sched_setaffinity(0, self._mine)
        return found

    def _answer(self, number: int, sock: socket.socket) -> float:
        """The summed loss of worker ``number``."""
        try:
            well, value = wire.ANSWER.unpack(wire.receive(sock, wire.ANSWER.size))
            if not well:
                message = wire.receive(sock, int(value)).decode()
                raise WorkerError(f"worker {number} failed: {message}")
        except EOFError as error:
            raise self._lost(number) from error
        return float(value)

    def _watched(self, share: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """``share``, ended by the first worker that is gone before a micro-batch."""
        for batch in share:
            for number, sock in enumerate(self._sockets, start=1):
                if wire.is_closed(sock):
                    raise self._why(number)
            yield batch

    def close(self) -> None:
        """Let the workers end, wait until they have, and give this thread its cores back."""
        if self._watcher is not None and self._end is not None:
            self._over.set()
            self._end[0].close()
            self._watcher.join()
            self._end[1].close()
            self._watcher = None
        for sock in self._sockets:
            sock.close()
        end = time.monotonic() + _PATIENCE  # one for all: several may hang
        for process in self._processes:
            try:
                process.wait(max(end - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._sockets, self._processes = [], []
        if self._affinity:
            os.sched_setaffinity(0, self._affinity)
            self._affinity = set()

    def _hire(self) -> None:
        for name, buffer in self.model.named_buffers():
            self._buffers[name].copy_(buffer)
        facts: dict[str, Any] = {
            "config": self.config.model_dump(mode="json"),
            "size": self.memory.size,
            "double": torch.get_default_dtype() == torch.float64,
        }
        cores = cores_of_workers(self.config)
        for number in range(1, self.size):
            mine, theirs = socket.socketpair()
            arguments = [str(theirs.fileno()), str(self.memory.fd), str(number)]
            with _signals_held():
                process = subprocess.Popen(
                    [*self.program, *arguments],
                    pass_fds=(theirs.fileno(), self.memory.fd),
                    stdin=subprocess.DEVNULL,
                )
            theirs.close()
            self._sockets.append(mine)
            self._processes.append(process)
            try:
                wire.send_facts(mine, facts | {"cores": cores[number] if cores else []})
            except OSError as error:
                raise self._lost(number) from error
        self._over.clear()
        self._end = socket.socketpair()
        watched = [self._end[1], *self._sockets]
        self._watcher = threading.Thread(
            target=self._watch, args=[watched], name="workers", daemon=True
        )
        self._watcher.start()
        self._mine = set(cores[0]) if cores else set()

    def _watch(self, sockets: Sequence[socket.socket]) -> None:
        """See ``when_lost``: the parent may be in the middle of a micro-batch, or of compiling. First of
        ``sockets`` is what tells that all is over."""
        place = wire.first_closed(sockets)
        if place and not self._over.wait(_PATIENCE) and self.when_lost is not None:
            self.when_lost(lambda: self._why(place))

    def _why(self, number: int) -> WorkerError:
        """Why worker ``number`` is gone: what it reports, if it does."""
        try:
            self._answer(number, self._sockets[number - 1])
        except WorkerError as error:
            return error
        return self._lost(number)

    def _lost(self, number: int) -> WorkerError:
        process = self._processes[number - 1]
        try:
            code = process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        how = "does not answer" if code is None else f"ended with code {code}"
        if code is not None and code < 0:
            how = f"was killed by signal {-code}"
        return WorkerError(
            f"worker {number} (process {process.pid}) {how}; nothing of its step was applied: go on from "
            "the last checkpoint with cllm train --resume"
        )


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM, which a terminal or a supervisor sends to the whole group, never reach a process
    that is started here: the parent decides when it is over. (A mask is inherited, so that no moment of
    the child's start is left open.)"""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cores_of_workers(config: Config) -> list[list[int]]:
    """The processor cores of each worker, ``train.threads`` each; none where they are not to be pinned.

    That is where others may want some of the cores, as a second run would the very same ones, while the
    rest stays idle: the system then places them better. Together the workers must have all cores that this
    process may run on.
    """
    train = config.train
    assert isinstance(train.parallel.workers, int)
    assert isinstance(train.threads, int)
    return cores_of_processes(train.threads, train.parallel.workers)


def cores_of_processes(each: int, count: int) -> list[list[int]]:
    """``each`` of this process's cores for each of ``count`` processes; none unless that is all of them."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) != each * count:
        return []
    return [mine[n * each : (n + 1) * each] for n in range(count)]
