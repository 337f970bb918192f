"""Who is blamed for the end of a training: another that is gone, unless it was told to stop."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from cllm.core.process import Process, host_name, start_time, this_process
from cllm.core.torchrun import Launch
from cllm.training.distributed.group import Group, LostProcessError


class Store:
    """As much of torch's as a claim asks of it."""

    def set_timeout(self, timeout: object) -> None: ...

    def add(self, key: str, amount: int) -> int:
        return 1


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "100"])
    yield child
    child.kill()
    child.wait()


@pytest.fixture
def group_with(
    other: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Group]:
    """A first process's group, whose other one is ``other``, who ends when it is told to stop."""

    def end(group: Group) -> None:
        other.kill()
        other.wait()

    monkeypatch.setattr(Group, "tell_stop", end)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)

    def make() -> Group:
        launch = Launch(rank=0, size=2, local_rank=0, local_size=2, job="a job")
        theirs = Process(host=host_name(), pid=other.pid, started=start_time(other.pid) or "")
        return Group(launch, Store(), None, [this_process(), theirs])  # type: ignore[arg-type]

    return make


def test_who_was_told_to_stop_may_be_gone(group_with: Callable[[], Group]) -> None:
    group = group_with()
    group.close()
    group.blame_the_lost(KeyboardInterrupt())


def test_who_was_gone_before_is_blamed(
    group_with: Callable[[], Group], other: subprocess.Popen[bytes]
) -> None:
    group = group_with()
    other.kill()
    other.wait()
    group.close()
    with pytest.raises(LostProcessError, match=rf"process 1 of torchrun \(pid {other.pid}\)"):
        group.blame_the_lost(KeyboardInterrupt())


def test_who_is_gone_in_the_middle_is_blamed(
    group_with: Callable[[], Group], other: subprocess.Popen[bytes]
) -> None:
    group = group_with()
    group.blame_the_lost(KeyboardInterrupt())
    other.kill()
    other.wait()
    with pytest.raises(LostProcessError, match="process 1 of torchrun"):
        group.blame_the_lost(KeyboardInterrupt())
