"""Memory that processes share and that no kill leaves behind: an anonymous file (memfd) with no name.

The memory is gone with the last process that holds it; a small /dev/shm does not matter. Tensors are
taken one after the other, each on a 64-byte boundary: processes that take the same ones in the same
order see the same memory.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cllm.core.errors import UserError

if TYPE_CHECKING:
    import torch

_ALIGN = 64


class SharedMemory:
    """A mapped anonymous file; pages that nobody writes to take no memory."""

    def __init__(self, fd: int, size: int) -> None:
        """Map ``size`` bytes of the file ``fd``, which is then this object's to close."""
        self.fd, self.size, self._taken = fd, size, 0
        self._map = mmap.mmap(fd, size)
        weakref.finalize(self, os.close, fd)  # the tensors keep the mapping, which is its own

    @classmethod
    def create(cls, size: int) -> SharedMemory:
        """New memory of ``size`` bytes, all zero. Raises ``UserError`` where the system has none."""
        if not hasattr(os, "memfd_create"):
            raise UserError(
                "workers share memory through memfd, which this system does not have (Linux does): "
                "use train.parallel.workers=1"
            )
        fd = os.memfd_create("cllm")
        os.ftruncate(fd, size)
        return cls(fd, size)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor; what is in it is what others wrote, or zeros."""
        import torch

        count = 1
        for length in shape:
            count *= length
        begin = self._taken
        self._taken = begin + -(-count * dtype.itemsize // _ALIGN) * _ALIGN
        assert self._taken <= self.size, "more was taken than was reserved"
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin)
        return flat.view(tuple(shape))
