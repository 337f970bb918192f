"""Keeping freed memory: what a training step returns, the next one needs again.

glibc gives large freed blocks back to the system and gets zeroed pages for the next allocation; at the
demo's size these page faults were measured to take a quarter of a step. Telling malloc to keep what it
has costs nothing but that the process stays at its peak. Other systems' allocators are left as they
are.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc not to return memory to the system. False where there is no glibc."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def give_back_freed_memory() -> bool:
    """Return what is free now to the system, once; ``keep_freed_memory`` goes on to hold. False where there
    is no glibc.

    For after a large structure was rebuilt in another: its small blocks are of no use to large ones.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0)))
