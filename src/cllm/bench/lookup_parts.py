"""Parts of the bench of look-ups: each measured in a process of its own, once, and kept in the cache."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cllm.bench.lookup_peers import PEERS
from cllm.core.atomic import remove, write_json
from cllm.core.errors import UserError
from cllm.core.machine import cache_dir, machine

FORMAT = 1
"""Raised when the index or what is measured changes so that kept figures no longer stand for it."""
VERSIONS = {"ours, cells": "2", "ours, cells, tuned": "2"}
"""Raised where only what one method does has changed."""


class Parts:
    """Figures, measured where they are not kept and there is time; ``missing`` names the others.

    ``here`` measures in this process and keeps nothing: a process for each table takes seconds to start.
    """

    def __init__(self, *, rounds: int, minutes: float | None, here: bool = False) -> None:
        self.rounds, self.here, self.missing = rounds, here, list[str]()
        self._until = None if minutes is None else time.monotonic() + 60 * minutes

    def rows(self, table: dict[str, Any], methods: Sequence[str]) -> list[dict[str, Any]]:
        """The figures of ``methods`` on a table (``V`` and ``D``, or ``run``), as far as they are known."""
        places = [self.place(table, method) for method in methods]
        found: list[dict[str, Any] | None] = [_kept(place) for place in places]
        open_ones = [i for i, row in enumerate(found) if row is None]
        case = table | {
            "methods": [methods[i] for i in open_ones],
            "places": [str(places[i].with_suffix(".building")) for i in open_ones],
            "rounds": self.rounds,
        }
        measured = self._measured("cllm.bench.lookup_contestant", case) if open_ones else iter(())
        # Kept one by one, so that nothing is lost where the next one fails or is killed.
        for i, row in zip(open_ones, measured, strict=False):
            found[i] = row
            if row is not None:
                self._keep(places[i], row)
        where = table.get("run") or f"V={table['V']:,}, D={table['D']}"
        self.missing += [
            f"{m} ({where})" for m, row in zip(methods, found, strict=True) if row is None
        ]
        return [row for row in found if row is not None]

    def proof(self, case: dict[str, Any]) -> int | None:
        """Queries of ``case`` that were answered wrongly."""
        place = _place(["proof", case])
        found: int | None = _kept(place)
        if found is None:
            found = next(self._measured("cllm.bench.lookup_proof", case), None)
            if found is None:
                self.missing.append(f"the proof of {case['metric']}")
            else:
                self._keep(place, found)
        return found

    def place(self, table: dict[str, Any], method: str) -> Path:
        """Where the figures of a method on a table are kept."""
        what: Any = _weights(Path(table["run"])) if "run" in table else table
        version = VERSIONS.get(method, "")
        if method in PEERS:
            version = metadata.version("faiss-cpu")
        return _place(["row", what, method, self.rounds, version])

    def _measured(self, module: str, case: dict[str, Any]) -> Iterator[Any]:
        """What the process of ``module`` prints, as it comes; nothing where the time is over."""
        left = None if self._until is None else self._until - time.monotonic()
        if left is not None and left <= 0:
            return
        case = case | {"seconds": left}
        if self.here:
            yield from importlib.import_module(module).main(case)
            return
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        env = dict(os.environ) | dict.fromkeys(names, "1")
        # A file for warnings, since nobody reads a pipe of them until it is full.
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(case)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
            ) as process,
        ):
            assert process.stdout is not None
            try:
                yield from map(json.loads, process.stdout)
            except BaseException:  # whoever reads has ended, too
                process.terminate()
                raise
            if process.wait():
                errors.seek(0)
                last = errors.read().strip().splitlines()[-1:] or ["no message"]
                raise UserError(f"the bench process for {case} failed: {last[0]}")

    def _keep(self, place: Path, found: Any) -> None:
        if not self.here:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, found)
            remove(place.with_suffix(".building"))


def _place(facts: list[Any]) -> Path:
    text = json.dumps([FORMAT, machine().cpu, facts], sort_keys=True)
    key = hashlib.sha256(text.encode("utf-8")).hexdigest()[:20]
    return cache_dir() / "lookup-bench" / f"{key}.json"


def _kept(place: Path) -> Any:
    return json.loads(place.read_text(encoding="utf-8")) if place.is_file() else None


def _weights(run: Path) -> str:
    """The hash of the weights whose table is looked into. Raises ``UserError`` if there are none."""
    from cllm.store.checkpoint import WEIGHTS, find

    with (find(run, "best") / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
