import os
import subprocess
import sys
from dataclasses import replace

import pytest

from cllm.core.process import Process, is_running, start_time, this_process


def test_we_live() -> None:
    me = this_process()
    assert me.pid == os.getpid()
    assert is_running(me) is True
    assert Process.from_json(me.to_json()) == me


def test_another_start_time_is_another_process() -> None:
    assert is_running(replace(this_process(), started="long ago")) is False


def test_other_machines_cannot_be_asked() -> None:
    assert is_running(replace(this_process(), host="elsewhere")) is None


def test_the_dead_are_dead_even_before_their_parent_waits() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = replace(this_process(), pid=child.pid, started=start_time(child.pid) or "")
    assert is_running(process) is True
    child.kill()
    if hasattr(os, "waitid"):
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # now a zombie
        assert is_running(process) is False
    child.communicate()
    assert is_running(process) is False
    assert start_time(child.pid) is None


@pytest.mark.parametrize("value", [None, 3, {}, {"host": "h", "pid": "x", "started": ""}])
def test_what_is_no_process(value: object) -> None:
    assert Process.from_json(value) is None
