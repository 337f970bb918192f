"""An output file of one JSON answer a line, in the order of the requests, that survives a kill."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.core.atomic import clear_errors
from cllm.core.errors import UsageError

Record = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """An output file under way: ``done`` lines are there already, ``write`` adds one."""

    done: int
    write: Callable[[int, Record], None]


def request_key(*parts: object) -> str:
    """What an answer depends on, as 12 hex digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@contextmanager
def answers(path: Path, keys: list[str], asked: Path) -> Iterator[Answers]:
    """Open ``path`` for the answers to requests of these ``keys``, in their order; ``asked`` holds them.

    Answers may come in any order; each is written when all before it are. Lines that an earlier call, or
    one that was killed, wrote for the same requests are kept, and half a line of the next one is dropped.
    Raises ``UsageError`` if the file holds anything else.
    """
    fresh = not path.exists()
    if not fresh and asked.exists() and path.samefile(asked):
        raise UsageError(f"--out {path} is the file that is to be answered; choose another --out")
    with clear_errors(path):
        # Unbuffered: what a full disk refused must not be tried again, and fail again, when it is closed.
        file = open(path, "x+b" if fresh else "r+b", buffering=0)  # noqa: SIM115
    with _removed_if_empty(path if fresh else None), file:
        _lock(file, path)
        done, size = _finished(path, keys)
        with clear_errors(path):
            file.truncate(size)
            file.seek(size)
        waiting: dict[int, Record] = {}
        following = done

        def write(index: int, body: Record) -> None:
            nonlocal following
            waiting[index] = body
            while following in waiting:
                line = _head(following, keys[following]) | waiting.pop(following)
                with clear_errors(path):
                    _write(file, json.dumps(line, ensure_ascii=False).encode() + b"\n")
                following += 1

        yield Answers(done, write)
        with clear_errors(path):
            os.fsync(file.fileno())


@contextmanager
def _removed_if_empty(made: Path | None) -> Iterator[None]:
    """Leave no file where the body fails before the one that was ``made`` for it holds an answer."""
    try:
        yield
    except BaseException:
        if made is not None and not made.stat().st_size:
            made.unlink()
        raise


def _lock(file: io.FileIO, path: Path) -> None:
    """Hold the open file ``path`` against other processes, for as long as it is open."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems have no locks
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UsageError(
                f"another process is writing {path}: wait for it, or choose another --out"
            ) from error


def _write(file: io.FileIO, body: bytes) -> None:
    left = memoryview(body)
    while left:
        left = left[file.write(left) :]


def _head(index: int, key: str) -> Record:
    """What an answer begins with."""
    return {"index": index, "request": key}


def _finished(path: Path, keys: list[str]) -> tuple[int, int]:
    """How many answers stand in the file already, and their size in bytes."""
    count = size = 0
    with clear_errors(path, "read"), path.open("rb") as lines:
        for line in lines:
            wanted = _head(count, keys[count]) if count < len(keys) else None
            if wanted and not line.endswith(b"\n") and _is_half(line, wanted):
                break  # cut off by a kill
            if not wanted or not line.endswith(b"\n") or not _answers(line, wanted):
                raise UsageError(
                    f"{path}:{count + 1} is no answer to this request with these options; choose another "
                    "--out, or delete the file"
                )
            count, size = count + 1, size + len(line)
    return count, size


def _is_half(line: bytes, wanted: Record) -> bool:
    """Whether an answer that begins with ``wanted`` may have begun with ``line``."""
    begun = json.dumps(wanted).encode().removesuffix(b"}")
    return line.startswith(begun) or begun.startswith(line)


def _answers(line: bytes, wanted: Record) -> bool:
    try:
        record = json.loads(line)
        return {name: record[name] for name in wanted} == wanted
    except (ValueError, TypeError, KeyError):
        return False
