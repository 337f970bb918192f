"""What was measured on this machine, kept between runs in the user's cache directory.

One small JSON file for each kind of machine: processor, instruction sets, torch version and threads.
A measurement is only a short-cut: a damaged file counts as none, and is replaced by the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from cllm.core.atomic import write_json
from cllm.core.errors import UserError
from cllm.core.machine import cache_dir, machine, torch_version

_meanwhile: dict[tuple[Path, str], Any] = {}
"""What is kept in this process only, by file and name."""
_apart: ContextVar[Path | None] = ContextVar("_apart", default=None)
"""Where measurements are, inside ``afresh``."""


@contextmanager
def afresh() -> Iterator[None]:
    """Inside, nothing counts that was measured before, and outside nothing that was measured inside: for
    who holds measurements against others of the same minutes, as a shared machine's speed comes and goes.
    """
    with tempfile.TemporaryDirectory(prefix="cllm-measurements-") as folder:
        token = _apart.set(Path(folder))
        try:
            yield
        finally:
            _apart.reset(token)
            for path, name in list(_meanwhile):
                if path.parent == Path(folder):
                    del _meanwhile[path, name]


def machine_facts(threads: int | None = None) -> dict[str, Any]:
    """What a measurement depends on; ``threads`` is the number used, if not the usable one."""
    here = machine()
    return {
        "cpu": here.cpu,
        "instruction_sets": list(here.instruction_sets),
        "torch": torch_version(),
        "vectors": os.environ.get("ATEN_CPU_CAPABILITY", ""),
        "threads": here.threads if threads is None else threads,
    }


def recall(name: str, *, threads: int | None = None) -> Any | None:
    """The measurement ``name`` made on a machine like this one, or ``None``."""
    path = _path(threads)
    return _meanwhile.get((path, name), _read(path).get(name))


def remember(name: str, value: Any, *, threads: int | None = None, for_good: bool = True) -> bool:
    """Keep the measurement ``name`` (any JSON). False if the cache directory cannot be written: then, too,
    it is kept in this process.

    ``for_good``: if not, it is kept in this process only, as what other programs may have spoiled. Two
    processes that remember at once may lose one of the two values, which is then measured anew.
    """
    path = _path(threads)
    _meanwhile[path, name] = value
    if not for_good:
        return True
    body = {"machine": machine_facts(threads), "values": _read(path) | {name: value}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, body)
    except (OSError, UserError):
        return False
    del _meanwhile[path, name]
    return True


def _path(threads: int | None) -> Path:
    facts = json.dumps(machine_facts(threads), sort_keys=True)
    folder = _apart.get() or cache_dir() / "measurements"
    return folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["values"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return values if isinstance(values, dict) else {}
