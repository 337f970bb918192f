"""An output file of one JSON answer a line, in the order of the requests, that survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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
        file = open(path, "x+b" if fresh else "r+b")  # noqa: SIM115
    with _removed_if_empty(path if fresh else None), file:
        done, size = _finished(file, path, keys)
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
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                    file.flush()
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


def _head(index: int, key: str) -> Record:
    """What an answer begins with."""
    return {"index": index, "request": key}


def _finished(file: IO[bytes], path: Path, keys: list[str]) -> tuple[int, int]:
    """How many answers stand in ``file`` already, and their size in bytes."""
    count = size = 0
    for line in file:
        wanted = _head(count, keys[count]) if count < len(keys) else {}
        if not line.endswith(b"\n"):
            begun = json.dumps(wanted).encode()[:-1]
            ours = bool(wanted) and (line.startswith(begun) or begun.startswith(line))
            if ours:
                break  # cut off by a kill
        else:
            ours = bool(wanted) and _answers(line, wanted)
        if not ours:
            raise UsageError(
                f"{path}:{count + 1} is no answer to this request with these options; choose another "
                "--out, or delete the file"
            )
        count, size = count + 1, size + len(line)
    return count, size


def _answers(line: bytes, wanted: Record) -> bool:
    try:
        record = json.loads(line)
        return {name: record[name] for name in wanted} == wanted
    except (ValueError, TypeError, KeyError):
        return False
