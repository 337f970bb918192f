"""Keeping freed memory, where there is glibc."""

from __future__ import annotations

import platform

from cllm.core.allocator import keep_freed_memory


def test_it_says_whether_there_is_glibc_to_tell() -> None:
    glibc = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
    assert keep_freed_memory() is glibc
