"""Workers on one machine: processes with gradients of their own over one copy of the weights.

Threads would not do: compiled code holds the interpreter's lock, and two threads were measured to be no
faster than one (``docs/speed.md``). The parent is worker 0 and takes its share like the others, of the
step's end too (``cllm.training.parallel.ending``). Who is left ends when another is gone: each sees its
socket close.
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
from cllm.training.parallel import wire
from cllm.training.parallel.cores import cores_of_workers
from cllm.training.parallel.ending import Ending
from cllm.training.parallel.shards import deal
from cllm.training.parallel.shared import Shared
from cllm.training.update import Update

_SEED_STRIDE = 7_919
_PATIENCE = 1.0
"""Seconds in which a worker that is gone is seen to be, and says why it ended."""
_PARTING = 0.2
"""Seconds that the workers get to end by themselves, as they do as soon as their sockets close, in the
middle of a step, too. Who is killed loses nothing, and all are to be gone within five seconds of a signal,
of which the step at hand may take three."""

Batches = Sequence[tuple[Tensor, Tensor]]


class WorkerError(UserError):
    """A worker ended, or reported an error, in the middle of training."""


class Crew:
    """The parent's side. ``begin`` hands a step out, ``results`` waits for what the others compute; then
    ``norm`` and ``apply`` end the step. Each raises ``WorkerError`` if a worker is gone, or with what it
    reports.

    ``program``: what a worker runs, with its arguments after it.
    """

    program: tuple[str, ...] = (sys.executable, "-m", "cllm.training.parallel.worker")

    def __init__(
        self,
        config: Config,
        memory: SharedMemory,
        model: Transformer,
        update: Update,
        cores: dict[str, Tensor],
    ) -> None:
        """Take the shared memory; the workers begin with the first step."""
        arena = update.arena
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
        self._update, self._own = update, Ending(update, self.shared, 0)
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

        ``scale`` is what the loss is multiplied with. The share looks for lost workers before each
        micro-batch.
        """
        if not self._processes:
            self._hire()
        ids, targets = self.shared.batch
        for number, (some_ids, some_targets) in enumerate(batches):
            ids[number].copy_(some_ids)
            targets[number].copy_(some_targets)
        seed = torch.initial_seed()
        for number in range(1, self.size):
            own = (seed + _SEED_STRIDE * number) % 2**63
            self._order(number, wire.COMPUTE, scale, integer=own)
        return self._watched(self.shared.share(self.shards[0]))

    def results(self) -> list[float]:
        """The summed loss of each other worker, in order."""
        found = self._answers()
        if self._mine and not self._affinity:
            self._affinity = os.sched_getaffinity(0)
            os.sched_setaffinity(0, self._mine)
        return found

    def norm(self, grad: Tensor) -> float:
        """Add the workers' gradients up into ``grad``, the arena's; its norm (see ``Norm``)."""
        assert grad is self.shared.grads[0]
        for number in range(1, self.size):
            self._order(number, wire.ADD_UP)
        self._own.add_up()
        self._answers()
        return self._own.norm.total()

    def apply(self, grad: Tensor, norm: float, unscale: float, lr: float, count: int) -> float:
        """Update with ``grad``, which is what ``norm`` added up (see ``Update.apply``)."""
        assert grad is self.shared.grads[0]
        factor = self._update.factor(norm, unscale)
        for number in range(1, self.size):
            self._order(number, wire.UPDATE, factor, lr, count)
        self._own.apply(factor, lr, count)
        self._answers()
        return factor

    def _order(
        self, number: int, what: int, factor: float = 0.0, lr: float = 0.0, integer: int = 0
    ) -> None:
        try:
            self._sockets[number - 1].sendall(wire.ORDER.pack(what, factor, lr, integer))
        except OSError as error:
            raise self._lost(number) from error

    def _answers(self) -> list[float]:
        """What each other worker answers, in order; waits for them."""
        return [self._answer(number, sock) for number, sock in enumerate(self._sockets, start=1)]

    def _answer(self, number: int, sock: socket.socket) -> float:
        """What worker ``number`` answers: its summed loss, or 0 where it was to end a step."""
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
        end = time.monotonic() + _PARTING  # one for all: several may hang
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
            f"worker {number} (process {process.pid}) {how}; its step is lost: go on from the last "
            "checkpoint with cllm train --resume"
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
