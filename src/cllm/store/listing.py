"""A list of runs and a comparison of some: read from their small files, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.core.errors import UserError
from cllm.core.settings import flatten
from cllm.store.metrics import last_line
from cllm.store.run import RunDirectory, runs_in
from cllm.store.status import Status


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run in the list. What is not known (yet) is ``None``."""

    name: str
    path: str
    state: str
    date: str
    """When it was made (ISO 8601, UTC)."""
    step: int | None = None
    steps: int | None = None
    """Steps it was configured for."""
    parameters: int | None = None
    validation_bpb: float | None = None
    """Bits per byte of the best validation."""
    test_bpb: float | None = None
    tokens_per_second: float | None = None
    bytes: int = 0
    """Size on disk."""


def list_runs(root: Path) -> list[Row]:
    """The runs directly in ``root``, oldest first. A damaged run is listed with what is wrong."""
    rows = [row_of(run) for run in runs_in(root)]
    return sorted(rows, key=lambda row: (row.date, row.name))


def row_of(run: RunDirectory) -> Row:
    """The row of one run."""
    size = size_of(run.path)
    try:
        status, config = run.status(), run.read_config()
        facts = _with_latest(run, status)
    except UserError as error:
        return Row(
            name=run.name, path=str(run.path), state=f"damaged: {error}", date="", bytes=size
        )
    return Row(
        name=run.name,
        path=str(run.path),
        state=status.state,
        date=status.created,
        step=facts.get("step"),
        steps=config.get("train", {}).get("steps"),
        parameters=facts.get("parameters"),
        validation_bpb=facts.get("validation_bpb"),
        test_bpb=facts.get("test_bpb"),
        tokens_per_second=facts.get("tokens_per_second"),
        bytes=size,
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side: each row is a name and one value a run."""

    names: list[str]
    settings: list[tuple[str, list[Any]]]
    """Settings in which the runs differ, by dotted key; ``None`` where a run lacks one."""
    results: list[tuple[str, list[Any]]]


def compare(runs: Sequence[RunDirectory]) -> Comparison:
    """Compare the configurations and results of ``runs`` (at least two)."""
    if len(runs) < 2:
        raise UserError("name at least two runs to compare")
    rows = [row_of(run) for run in runs]
    configs = [flatten(run.read_config()) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    settings = [(key, [config.get(key) for config in configs]) for key in keys]
    fields = (
        "state",
        "step",
        "parameters",
        "validation_bpb",
        "test_bpb",
        "tokens_per_second",
        "bytes",
    )
    return Comparison(
        names=[run.name for run in runs],
        settings=[(key, values) for key, values in settings if _differ(values)],
        results=[(name, [getattr(row, name) for row in rows]) for name in fields],
    )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; links count as what they take themselves."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    total = 0
    for parent, _, names in os.walk(path):
        for name in names:
            try:
                total += Path(parent, name).lstat().st_size
            except FileNotFoundError:  # a run in training prunes its checkpoints
                continue
    return total


def _with_latest(run: RunDirectory, status: Status) -> Mapping[str, Any]:
    """The figures in the status, completed from the end of the metrics where a kill cut them short."""
    facts = dict(status.facts)
    if "step" not in facts or status.state in ("running", "interrupted"):
        train = last_line(run.metrics, "train") or {}
        facts["step"] = train.get("step", facts.get("step"))
        facts.setdefault("tokens_per_second", train.get("time", {}).get("tokens_per_second"))
    if "validation_bpb" not in facts:
        facts["validation_bpb"] = (last_line(run.metrics, "validation") or {}).get("bpb")
    return facts


def _differ(values: list[Any]) -> bool:
    return any(value != values[0] for value in values)
