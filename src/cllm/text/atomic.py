"""Files that are whole or absent: a temporary name beside the place, fsync, rename."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cllm.core.errors import UserError

_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@contextmanager
def readable_errors(what: str) -> Iterator[None]:
    """Turn a full disk or a forbidden place into a one-line ``UserError`` that names ``what``."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"cannot write {what}: {error.strerror}; free some space or choose another --out"
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError):
            place = error.filename or what
            raise UserError(f"cannot open {place}: {error.strerror}") from error
        raise


def sync_directory(path: Path) -> None:
    """Make a rename in ``path`` durable, where the system lets a directory be opened (not Windows)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A writable, seekable binary file that appears at ``path`` when the block ends well.

    Raises ``UserError`` where the disk is full or the place may not be written; whatever goes wrong,
    nothing is left behind and a file that was at ``path`` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with readable_errors(str(path)):
        try:
            with open(temporary, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_directory(path.parent)
