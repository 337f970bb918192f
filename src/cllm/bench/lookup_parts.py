"""Parts of the bench of look-ups: each measured in a process of its own, once, and kept in the cache."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from cllm.bench.lookup_peers import PEERS
from cllm.core.atomic import remove, write_json
from cllm.core.errors import UserError
from cllm.core.machine import cache_dir, machine

FORMAT = 1
"""Raised when the index or what is measured changes so that kept figures no longer stand for it."""


class Parts:
    """Figures, measured where they are not kept and there is time; ``missing`` names the others.

    ``here`` measures in this process and keeps nothing: a process for each part takes seconds to start.
    """

    def __init__(self, *, rounds: int, minutes: float | None, here: bool = False) -> None:
        self.rounds, self.here, self.missing = rounds, here, list[str]()
        self._until = None if minutes is None else time.monotonic() + 60 * minutes

    def row(self, table: dict[str, Any], method: str) -> dict[str, Any] | None:
        """The figures of a method on a table (``V`` and ``D``, or ``run``)."""
        case = table | {"method": method, "rounds": self.rounds}
        facts: list[Any] = [case]
        if "run" in table:
            facts = [{k: v for k, v in case.items() if k != "run"}, _weights(Path(table["run"]))]
        if method in PEERS:
            facts.append(metadata.version("faiss-cpu"))
        where = table.get("run") or f"V={table['V']:,}, D={table['D']}"
        found: dict[str, Any] | None = self._part(
            "cllm.bench.lookup_contestant", case, facts, f"{method} ({where})"
        )
        return found

    def proof(self, case: dict[str, Any]) -> int | None:
        """Queries of ``case`` that were answered wrongly."""
        found: int | None = self._part(
            "cllm.bench.lookup_proof", case, [case], f"the proof of {case['metric']}"
        )
        return found

    def _part(self, module: str, case: dict[str, Any], facts: list[Any], name: str) -> Any:
        if self.here:
            return importlib.import_module(module).main(case | {"place": os.devnull})
        text = json.dumps([FORMAT, machine().cpu, module, facts], sort_keys=True)
        key = hashlib.sha256(text.encode("utf-8")).hexdigest()[:20]
        place = cache_dir() / "lookup-bench" / f"{key}.json"
        if place.is_file():
            return json.loads(place.read_text(encoding="utf-8"))
        left = None if self._until is None else self._until - time.monotonic()
        building = place.with_suffix(".building")
        found = None
        if left is None or left > 0:
            more = {"seconds": left, "place": str(building)}
            found = _measure(module, case | more)
        if found is None:
            self.missing.append(name)
            return None
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, found)
        remove(building)
        return found


def _measure(module: str, case: dict[str, Any]) -> Any:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    env = dict(os.environ) | dict.fromkeys(names, "1")
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(case)], capture_output=True, text=True, env=env
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"the bench process for {case} failed: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def _weights(run: Path) -> str:
    """The hash of the weights whose table is looked into. Raises ``UserError`` if there are none."""
    from cllm.store.checkpoint import WEIGHTS, find

    with (find(run, "best") / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
