"""What of the runs on disk is of no more use, and deleting it. A run in training is never touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cllm.core.atomic import leftovers, remove
from cllm.core.errors import UserError
from cllm.store import steps
from cllm.store.listing import size_of
from cllm.store.lock import is_locked
from cllm.store.run import RunDirectory, runs_in
from cllm.store.status import Status


@dataclass(frozen=True, kw_only=True)
class Waste:
    """Something that can go: ``bytes`` on disk, and why in a few words."""

    path: Path
    bytes: int
    why: str


def find_waste(root: Path, *, checkpoints: bool = False) -> list[Waste]:
    """What ``clean`` would delete in the runs directly in ``root``.

    Leftovers of killed processes; runs that ended without a checkpoint, which nothing can resume or use;
    with ``checkpoints`` also every checkpoint but the best and the last of each run.
    """
    found = [_waste(path, "left by a killed process") for path in leftovers(root)]
    for run in runs_in(root):
        if is_locked(run.path):
            continue
        if _is_incomplete(run):
            found.append(_waste(run.path, "a run without a checkpoint"))
            continue
        for folder in (run.path, run.checkpoints, run.data, run.plots):
            found += [_waste(path, "left by a killed process") for path in leftovers(folder)]
        if checkpoints:
            found += [_waste(path, "neither best nor last") for path in _superfluous(run)]
    return found


def clean(waste: Sequence[Waste]) -> int:
    """Delete what ``find_waste`` found; returns the bytes freed. Raises ``UserError``."""
    freed = 0
    for item in waste:
        remove(item.path)
        freed += item.bytes
    return freed


def _waste(path: Path, why: str) -> Waste:
    return Waste(path=path, bytes=size_of(path), why=why)


def _is_incomplete(run: RunDirectory) -> bool:
    if run.steps():
        return False
    try:
        status = run.status()
    except UserError:
        return False  # damaged: for its owner to judge
    return status.state == "interrupted" or (status.state == "new" and _is_old(status))


def _is_old(status: Status) -> bool:
    """A new run is without a lock for the moment between its making and the start of training."""
    try:
        return datetime.now(UTC) - datetime.fromisoformat(status.created) > timedelta(hours=1)
    except (ValueError, TypeError):
        return False


def _superfluous(run: RunDirectory) -> list[Path]:
    kept = {run.steps()[-1], steps.best_step(run.path)} if run.steps() else set()
    return [steps.step_directory(run.path, step) for step in run.steps() if step not in kept]
