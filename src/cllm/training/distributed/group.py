"""The processes of one torchrun: how the first gives orders, and how a loss is told, once.

Orders go over a group of their own, which may wait for days: the others have nothing to do while the
first prepares the text or a whole validation runs. A process that dies closes its connections, which its
neighbours see at once.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cllm.core.errors import UserError
from cllm.core.process import Process, is_running, this_process
from cllm.core.torchrun import Launch, leave

PATIENCE = timedelta(days=7)
"""How long the others wait for an order."""
JOIN_PATIENCE = timedelta(minutes=5)
_NUMBERS = 8
_STORE_PATIENCE = timedelta(seconds=2)
_DYING = 1.0
"""Seconds in which a process that closed its connections is expected to be dead."""
_LOOK = 0.25
"""Seconds between two looks whether the others are there."""
_NOTICE = 2.0
"""Seconds in which a process notices that another is gone if it waits for it."""
_NETWORK = re.compile(r"gloo|NCCL|[Cc]onnection|[Ss]ocket|Timed out|\bstore\b|TCPStore")
"""Words of what torch says when another process is not there any more."""


class LostProcessError(UserError):
    """Another process of the torchrun is gone."""


class Kind(IntEnum):
    """What the first orders all to do."""

    STOP = 0
    STEP = 1
    EVALUATE = 2
    LOAD = 3
    GATHER = 4
    SAVE = 5


@dataclass(frozen=True)
class Order:
    """``shape``: of the windows that follow; ``numbers``: at most eight; ``seed``: of the step."""

    kind: Kind
    numbers: tuple[float, ...] = ()
    seed: int = 0
    shape: tuple[int, ...] = (0, 0, 0, 0)

    def pack(self) -> Tensor:
        """As 64-bit words."""
        numbers = [*self.numbers, *[0.0] * (_NUMBERS - len(self.numbers))]
        words = struct.unpack(f"<{_NUMBERS}q", struct.pack(f"<{_NUMBERS}d", *numbers))
        return torch.tensor(
            [self.kind, self.seed, len(self.numbers), *self.shape, *words], dtype=torch.int64
        )

    @classmethod
    def unpack(cls, words: Tensor) -> Order:
        """The inverse of ``pack``."""
        kind, seed, count, *rest = words.tolist()
        numbers = struct.unpack(f"<{_NUMBERS}d", struct.pack(f"<{_NUMBERS}q", *rest[4:]))
        return cls(Kind(kind), numbers[:count], seed, tuple(rest[:4]))


class Group:
    """This process among the others; made by ``join``."""

    def __init__(
        self,
        launch: Launch,
        store: dist.Store,
        control: Any,
        everyone: Sequence[Process | None],
    ) -> None:
        self.launch, self._store, self._control = launch, store, control
        self._everyone = everyone
        self.rank, self.size = launch.rank, launch.size
        self._closed = self._briefed = False
        self._gone_before: list[str] = []

    @classmethod
    def join(cls, launch: Launch) -> Group:
        """Wait until all processes are there. Raises ``UserError`` if they do not come."""
        backend = "gloo"
        if torch.cuda.is_available() and torch.cuda.device_count() >= launch.local_size:
            torch.cuda.set_device(launch.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        try:
            group = _beside(lambda: cls._meet(launch, backend))
        except RuntimeError as error:
            raise UserError(
                f"the {launch.size} processes of torchrun did not find each other: {_first_line(error)}"
            ) from error
        threading.Thread(target=group._watch, name="others", daemon=True).start()
        return group

    @classmethod
    def _meet(cls, launch: Launch, backend: str) -> Group:
        from torch.distributed.rendezvous import rendezvous

        _look_for_torchrun()
        store, rank, size = next(rendezvous("env://", timeout=JOIN_PATIENCE))
        # The agent's store outlives a restart, with all that the dead wrote into it.
        store = dist.PrefixStore(f"attempt/{launch.attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        mine = dist.PrefixStore("cllm", store)
        mine.set(str(rank), json.dumps(this_process().to_json()))
        everyone = [Process.from_json(json.loads(mine.get(str(n)))) for n in range(size)]
        return cls(launch, mine, control, everyone)

    def tell(self, order: Order) -> None:
        """The first's order to all others."""
        with self.watching():
            dist.broadcast(order.pack(), 0, group=self._control)

    def hear(self) -> Order:
        """What the first orders; waits for it."""
        words = torch.empty(3 + 4 + _NUMBERS, dtype=torch.int64)
        with self.watching():
            dist.broadcast(words, 0, group=self._control)
        return Order.unpack(words)

    def hand_out(self, windows: Sequence[Tensor]) -> Tensor:
        """Give each process its windows (the first its own back)."""
        mine = torch.empty_like(windows[0])
        with self.watching():
            dist.scatter(mine, list(windows), 0, group=self._control)
        return mine

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """The windows that the first hands out."""
        mine = torch.empty(shape, dtype=torch.int64)
        with self.watching():
            dist.scatter(mine, None, 0, group=self._control)
        return mine

    def brief(self, facts: dict[str, Any] | None = None) -> Any:
        """The first's first word: what is to be trained, or ``None`` if nothing is."""
        self._briefed = True
        return self.share_json(facts)

    def share_json(self, value: Any = None) -> Any:
        """The first's JSON value, in all processes."""
        data = json.dumps(value).encode()
        length = torch.tensor([len(data)])
        with self.watching():
            dist.broadcast(length, 0, group=self._control)
            words = torch.empty(int(length), dtype=torch.uint8)
            if self.rank == 0:
                words = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            dist.broadcast(words, 0, group=self._control)
        return json.loads(words.numpy().tobytes())

    def all_agree(self, well: bool) -> bool:
        """Whether all processes say yes."""
        votes = torch.tensor([int(well)])
        with self.watching():
            dist.all_reduce(votes, dist.ReduceOp.MIN, group=self._control)
        return bool(votes)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What torch raises within, because another process is gone, becomes a ``LostProcessError``."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not _NETWORK.search(str(error)):
                raise
            raise LostProcessError(self._who_is_lost(error)) from error

    def claim(self) -> bool:
        """Whether this process is the first to tell how it ended; the others then say nothing."""
        try:
            self._store.set_timeout(_STORE_PATIENCE)
            return self._store.add("told", 1) == 1
        except RuntimeError:
            return True

    def close(self) -> None:
        """Let the others end, if they still listen."""
        if self._closed:
            return
        self._closed = True
        if self.rank == 0:
            self._gone_before = self._gone()
            with suppress(LostProcessError):
                self.tell_stop()
        with suppress(RuntimeError):
            dist.destroy_process_group()

    def tell_stop(self) -> None:
        """The last order; the others may be briefed anew."""
        if self._briefed:
            self.tell(Order(Kind.STOP))
        else:
            self.brief(None)
        self._briefed = False

    def blame_the_lost(self, error: BaseException) -> None:
        """Raises ``LostProcessError`` where another process is gone: torchrun then sends the rest a signal,
        which is not why they end. Those that were told to stop may be gone."""
        if gone := self._gone_before if self._closed else self._gone():
            self.abandon()
            if not self.claim():
                leave(1)
            raise LostProcessError(_lost(gone)) from error

    def abandon(self) -> None:
        """Give up: what is left of the group is no use any more."""
        self._closed = True

    def _watch(self) -> None:
        """End this process where another of this machine is gone and this one does not notice, as it
        compiles."""
        while not self._gone():
            if self._closed:
                return
            time.sleep(_LOOK)
        time.sleep(_NOTICE)
        if self._closed:
            return
        if self.claim():
            print(f"cllm: {_lost(self._gone())}", file=sys.stderr)
        leave(1)

    def _who_is_lost(self, error: RuntimeError) -> str:
        gone = self._gone()
        end = time.monotonic() + _DYING
        while not gone and time.monotonic() < end:  # connections close before a process is dead
            time.sleep(0.02)
            gone = self._gone()
        return _lost(gone or [f"a process of torchrun is gone ({_first_line(error)})"])

    def _gone(self) -> list[str]:
        """Those of this machine that are dead."""
        return [
            f"process {rank} of torchrun (pid {process.pid}) is gone"
            for rank, process in enumerate(self._everyone)
            if process is not None and is_running(process) is False
        ]


def _lost(gone: Sequence[str]) -> str:
    what = " and ".join(gone)
    return f"{what}; nothing of its step was saved: go on from the last checkpoint with --resume"


def _look_for_torchrun() -> None:
    """Raises ``UserError`` where torchrun, which answers before it starts a process, was killed before this
    one knew its parent; torch would go on asking."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    try:
        socket.create_connection(place, JOIN_PATIENCE.total_seconds()).close()
    except ConnectionRefusedError as error:
        raise UserError("torchrun is gone; nothing was trained") from error
    except OSError:
        return  # torch says it better


def _beside(work: Callable[[], Group]) -> Group:
    """``work`` done by another thread, so that this one hears signals: torchrun sends one where a process
    is gone, and those that wait for it are in the middle of a call of torch."""
    found: Future[Group] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name="join", daemon=True).start()
    return found.result()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
