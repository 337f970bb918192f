"""How much memory there is, how much we may use, and how much this process has used. Bytes throughout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from cllm.core import cgroup


def total_memory() -> int | None:
    """Memory of this machine in bytes; ``None`` where the system does not tell."""
    if sys.platform == "win32":
        return _windows_memory()[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def memory_limit() -> int | None:
    """The cgroup's limit in bytes, or ``None`` where there is none below the machine's memory."""
    limit, total = cgroup.memory_limit(), total_memory()
    return limit if limit is not None and (total is None or limit < total) else None


def available_memory() -> int | None:
    """Memory that a new allocation can use without swapping, the cgroup's limit observed."""
    free = _available_on_machine()
    limit = memory_limit()
    if limit is None:
        return free
    left = max(0, limit - (cgroup.memory_used() or 0))
    return left if free is None else min(free, left)


def peak_rss() -> int:
    """The largest resident set this process has had, in bytes."""
    if sys.platform == "win32":
        return _windows_peak()
    # Linux's getrusage counts what the parent process had before it became this one; VmHWM does not.
    own = _kibibytes(Path("/proc/self/status"), "VmHWM:")
    if own is not None:
        return own
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _available_on_machine() -> int | None:
    if sys.platform == "win32":
        return _windows_memory()[1]
    if sys.platform == "darwin":
        return _macos_available(_vm_stat())
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable:")


def _kibibytes(path: Path, field: str) -> int | None:
    """The size that a file of /proc gives for ``field`` in kB (KiB are meant), in bytes."""
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _vm_stat() -> str | None:
    """What macOS says of its pages, or ``None``."""
    try:
        return subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _macos_available(pages: str | None) -> int | None:
    """Free, inactive, speculative and purgeable pages: what macOS hands out without swapping."""
    if pages is None:
        return None
    size = re.search(r"page size of (\d+) bytes", pages)
    wanted = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
    counts = [
        int(line.rpartition(":")[2].strip().rstrip("."))
        for line in pages.splitlines()
        if line.startswith(wanted)
    ]
    return sum(counts) * int(size[1]) if size and len(counts) == len(wanted) else None


def _windows_memory() -> tuple[int, int]:  # pragma: no cover - Windows only
    """(total, available)."""
    import ctypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "available", "page_total")),
            *((name, ctypes.c_ulonglong) for name in ("page", "virtual_total", "virtual", "extra")),
        )

    status = MemoryStatus()
    status.length = ctypes.sizeof(status)
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    kernel.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.total, status.available


def _windows_peak() -> int:  # pragma: no cover - Windows only
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):
        _fields_ = (
            ("size", wintypes.DWORD),
            ("faults", wintypes.DWORD),
            ("peak", ctypes.c_size_t),
            *((f"rest{index}", ctypes.c_size_t) for index in range(7)),
        )

    counters = Counters()
    counters.size = ctypes.sizeof(counters)
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    kernel.K32GetProcessMemoryInfo(
        wintypes.HANDLE(kernel.GetCurrentProcess()), ctypes.byref(counters), counters.size
    )
    return counters.peak
