"""``metrics.jsonl``: what was measured at each step, one JSON object a line.

Every line has ``step`` and ``kind`` (``train``, ``validation``, ``test``, ``sample``, ``skip``…). What
depends on the clock stands in the sub-object ``time``, so that a run that was killed and resumed has
otherwise the same lines as one that ran straight through. Numbers that are not finite are ``null``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from cllm.core.atomic import clear_errors, flush_to_disk, new_file
from cllm.core.errors import UserError

Columns = dict[str, list[Any]]


class MetricsLog:
    """Appends lines to ``metrics.jsonl``; a context manager.

    The lines of a step belong before its checkpoint (``sync``, then save): what is resumed from the
    checkpoint then holds all of them.
    """

    def __init__(
        self, path: Path, *, resume_from: int | None = None, without: tuple[str, ...] = ()
    ) -> None:
        """Start anew, or keep the lines up to and with step ``resume_from`` and append to them.

        ``without``: kinds of which that step's lines are not kept, as they are written again.
        Raises ``UserError`` if the file cannot be written, or, on resume, is damaged before its end.
        """
        self.path = path
        if resume_from is None:
            with new_file(path):
                pass
        else:
            cut_after(path, resume_from, without)
        with clear_errors(path):
            self._file = path.open("ab")

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Append one line and flush it: a kill tears the last line at most.

        ``values``: JSON values; those that depend on the clock as one dict ``time=…``.
        """
        line = json.dumps(_finite({"step": step, "kind": kind} | values), ensure_ascii=False)
        with clear_errors(self.path):
            # A lone surrogate becomes "\udc80", which is how JSON writes it.
            self._file.write(line.encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()

    def sync(self) -> None:
        """Have the system write the lines down to the disk (once a checkpoint, not once a line)."""
        with clear_errors(self.path):
            flush_to_disk(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with clear_errors(self.path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_lines(path: Path, *, tail: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects in the file, or in its last ``tail`` bytes; nothing if there is no file.

    A last line that a kill has torn is left out. Raises ``UserError`` naming any other damaged line.
    """
    if not path.exists():
        return
    for _, line in _numbered(path, tail):
        yield line


def read_columns(path: Path, kind: str) -> Columns:
    """The lines of ``kind`` as columns of equal length, by name.

    The fields of ``time`` are named ``time.…``. Where a line lacks a field, or has ``null``, stands NaN.
    """
    rows = [_flat(line) for line in read_lines(path) if line["kind"] == kind]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_or_nan(row.get(name)) for row in rows] for name in names}


def last_line(path: Path, kind: str) -> dict[str, Any] | None:
    """The last line of ``kind`` among the last 64 KiB of the file, or ``None``."""
    found = None
    for line in read_lines(path, tail=65_536):
        if line["kind"] == kind:
            found = line
    return found


def cut_after(path: Path, step: int, without: tuple[str, ...] = ()) -> None:
    """Remove, atomically, the lines of later steps than ``step``, those of the kinds ``without`` of that
    step itself, and a torn last line."""
    if not path.exists():
        raise UserError(f"{path} is missing; make an empty file of that name to resume without it")
    with clear_errors(path):
        before = path.stat().st_size
        kept = [
            raw
            for raw, line in _numbered(path)
            if line["step"] < step or (line["step"] == step and line["kind"] not in without)
        ]
        if sum(map(len, kept)) != before:
            with new_file(path) as file:
                file.writelines(kept)


def _numbered(path: Path, tail: int | None = None) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(raw line, object) of each line."""
    with clear_errors(path, "read"), path.open("rb") as file:
        if tail is not None and path.stat().st_size > tail:
            file.seek(-tail, os.SEEK_END)
            file.readline()  # begins in the middle
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return  # torn by a kill: every whole line ends so
            try:
                line = json.loads(raw)
                line["step"], line["kind"]
            except (ValueError, TypeError, KeyError):
                if not file.read(1):
                    return  # the last line: a power cut can leave a block of zeros
                where = f"line {number}" if tail is None else "a line near the end"
                raise UserError(
                    f"{path}: {where} is damaged; remove it to read the others"
                ) from None
            yield raw, line


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _flat(line: dict[str, Any]) -> dict[str, Any]:
    time = line.pop("time", {})
    return line | {f"time.{name}": value for name, value in time.items()}


def _or_nan(value: Any) -> Any:
    return math.nan if value is None else value
