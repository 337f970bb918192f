"""Which process wrote this, and is it still alive? (Locks and temporary names carry the answer.)

A process id alone is not an identity: ids are used again after a reboot, and a container hands the
same small ones to every start. So an identity is host, id and start time.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of some machine. ``started`` is empty where the system does not tell."""

    host: str
    pid: int
    started: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Process | None:
        """The process a JSON object describes, or ``None`` if it describes none."""
        try:
            return cls(
                host=str(value["host"]), pid=int(value["pid"]), started=str(value["started"])
            )
        except (KeyError, TypeError, ValueError):
            return None


@cache
def host_name() -> str:
    """This machine's network name."""
    return platform.node()


def this_process() -> Process:
    """The identity of the running process."""
    return Process(host=host_name(), pid=os.getpid(), started=start_time(os.getpid()) or "")


def is_running(process: Process) -> bool | None:
    """Whether ``process`` lives; ``None`` if it belongs to another machine, which we cannot ask."""
    if process.host != host_name():
        return None
    now = start_time(process.pid)
    if now is None:
        return False
    return not (process.started and now) or process.started == now


def start_time(pid: int) -> str | None:
    """A text that tells the start of process ``pid`` from that of any other holder of its id.

    ``None`` if no such process lives; empty if one lives whose start the system does not tell.
    """
    if sys.platform == "win32":
        return _start_on_windows(pid)
    if not _exists(pid):
        return None
    if sys.platform == "linux":
        return _start_on_linux(pid)
    answer = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    return answer.stdout.strip()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _start_on_linux(pid: int) -> str | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""
    # The name stands in parentheses and may hold spaces and parentheses itself.
    fields = text.rpartition(")")[2].split()
    if fields[0] in "ZX":  # dead, only not yet waited for by its parent
        return None
    return f"{boot}:{fields[19]}"


def _start_on_windows(pid: int) -> str | None:  # pragma: no cover - Windows only
    # os.kill(pid, 0) would send Ctrl-C there, hence the system calls.
    import ctypes
    from ctypes import wintypes

    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
    kernel.OpenProcess.restype = wintypes.HANDLE
    handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        # 5 is ERROR_ACCESS_DENIED: it lives, but belongs to someone else.
        return "" if ctypes.get_last_error() == 5 else None  # type: ignore[attr-defined,unused-ignore]
    handle = wintypes.HANDLE(handle)
    try:
        code = wintypes.DWORD()
        kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        if code.value != 259:  # STILL_ACTIVE
            return None
        times = [wintypes.FILETIME() for _ in range(4)]
        kernel.GetProcessTimes(handle, *(ctypes.byref(time) for time in times))
        return f"{times[0].dwHighDateTime}:{times[0].dwLowDateTime}"
    finally:
        kernel.CloseHandle(handle)
