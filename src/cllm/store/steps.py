"""The ``checkpoints`` folder of a run: which steps it holds, which is best, and which may go.

Nothing here reads a tensor, so that listing and cleaning runs need no torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from cllm.core.atomic import clear_errors, point, pointed_at, remove
from cllm.core.errors import UserError
from cllm.store.manifest import DamagedCheckpointError, read_manifest

_NAME = re.compile(r"step-(\d{8,})")


def step_directory(run: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` stands in the run directory ``run``."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(directory: Path) -> int | None:
    """The step in a checkpoint directory's name, or ``None`` if it is no such name."""
    match = _NAME.fullmatch(directory.name)
    return int(match[1]) if match else None


def steps(run: Path) -> list[int]:
    """Steps that ``run`` has a checkpoint of, oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    with clear_errors(folder, "read"):
        found = [step_of(path) for path in folder.iterdir() if path.is_dir()]
    return sorted({step for step in found if step is not None})


def best_step(run: Path, *, certain: bool = False) -> int | None:
    """The newest step that was the best when it was saved, or ``None``.

    The checkpoints themselves say so. The link ``best`` is made after the checkpoint it points at, and
    a kill can come between the two: it is there for people, not for us. A newer checkpoint that is damaged
    is passed over, or, to be ``certain``, raises ``DamagedCheckpointError``: it may have been the best.
    """
    for step in reversed(steps(run)):
        directory = step_directory(run, step)
        try:
            if read_manifest(directory).best:
                return step
        except DamagedCheckpointError:
            if certain and directory.exists():  # not pruned while we looked
                raise
    return None


def chosen_step(run: Path) -> int:
    """The step that a run stands for: its best, else its last.

    Raises ``UserError`` where there is none, and ``DamagedCheckpointError`` as ``best_step`` does.
    """
    known = steps(run)
    if not known:
        raise UserError(f"{run} has no checkpoint yet: remove it and begin anew")
    best = best_step(run, certain=True)
    return known[-1] if best is None else best


def locate(path: Path) -> tuple[Path, int | None]:
    """(run directory, step) of a path to a run, to one of its checkpoints, or to ``best``/``last``.

    The step is ``None`` for a path to the run itself. Raises ``UserError`` if it is neither.
    """
    pointer = pointed_at(path) if path.name in ("best", "last") else None
    directory = path.parent / pointer if pointer else path
    step = step_of(directory)
    if step is not None and directory.parent.name == "checkpoints":
        return directory.parent.parent, step
    if (path / "checkpoints").is_dir():
        return path, None
    raise UserError(f"{path} is neither a run with checkpoints nor one of its checkpoints")


def refresh_links(run: Path) -> None:
    """Point ``last`` and ``best`` at what the checkpoints say they are."""
    known, folder = steps(run), run / "checkpoints"
    targets = {"last": known[-1] if known else None, "best": best_step(run)}
    for name, step in targets.items():
        link = folder / name
        target = None if step is None else step_directory(run, step).name
        if target is None:
            link.unlink(missing_ok=True)
        elif pointed_at(link) != target:
            point(link, target)


def prune(run: Path, keep_last: int) -> list[Path]:
    """Delete all checkpoints but the ``keep_last`` newest and the best; returns what was deleted."""
    assert keep_last >= 1, "a run without its last checkpoint cannot be resumed"
    best = best_step(run)
    doomed = [step_directory(run, step) for step in steps(run)[:-keep_last] if step != best]
    for directory in doomed:
        remove(directory)
    return doomed


def discard_after(run: Path, step: int) -> list[Path]:
    """Delete the checkpoints newer than ``step``, from which a run goes on anew.

    Returns what was deleted. The newest goes first, so that a kill leaves no gap.
    """
    doomed = [step_directory(run, later) for later in reversed(steps(run)) if later > step]
    for directory in doomed:
        remove(directory)
    refresh_links(run)
    return doomed
