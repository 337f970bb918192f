"""Checkpoints: weights, optimizer and training state of one step, whole or not there at all.

``checkpoints/step-00001000/{model.safetensors, optimizer.pt, state.json}``. Weights are safetensors,
the optimizer is torch's format read with ``weights_only=True``, so that loading a stranger's checkpoint
runs no code. Weights and moments that several processes wrote together lie in ``sharded/`` instead
(``cllm.store.sharded``); they are read like any other.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cllm.core.atomic import clear_errors, new_directory
from cllm.core.errors import UserError
from cllm.store import sharded
from cllm.store import steps as folder
from cllm.store.arrays import WEIGHTS
from cllm.store.manifest import (
    DamagedCheckpointError,
    Manifest,
    check_files,
    file_facts,
    read_manifest,
    write_manifest,
)

OPTIMIZER = "optimizer.pt"

Which = Literal["last", "best"] | int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One step of a run as it was saved, on the CPU."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    """Empty when loaded with ``with_optimizer=False``."""
    state: dict[str, Any]
    path: Path


def save(
    run_dir: Path,
    step: int,
    *,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    keep_last: int,
    best: bool,
    shards: Callable[[Path], None] | None = None,
) -> Path:
    """Save the checkpoint of ``step``, point ``last`` (and ``best``) at it, delete what is superfluous.

    ``weights``: parameter name to tensor, a tied one once. ``optimizer``: a tree of dicts, lists,
    tensors and plain values. ``state``: any JSON. Kept are the ``keep_last`` newest checkpoints and the
    best one. ``shards``: has all processes write their weights and moments into the directory it is given;
    ``weights`` and the optimizer's moments are then left out. Returns the checkpoint's directory. A kill at
    any moment leaves the run with its last whole checkpoint. Raises ``UserError`` if the disk refuses.
    """
    directory = folder.step_directory(run_dir, step)
    with clear_errors(directory.parent):
        directory.parent.mkdir(exist_ok=True)
    with new_directory(directory) as new:
        _fill(new, Manifest(step=step, best=best, state=state), weights, optimizer, shards)
    folder.refresh_links(run_dir)
    folder.prune(run_dir, keep_last)
    return directory


def convert(path: Path, *, to_shards: bool) -> bool:
    """Write the checkpoint at ``path`` anew, in one piece or as shards (one, until several processes go on
    with it); its tensors keep their bits. False if it is so already.

    Raises ``UserError`` if it is damaged or the disk refuses.
    """
    manifest = read_manifest(path)
    if _is_sharded(manifest) == to_shards:
        return False
    whole = _read(path, with_optimizer=True)
    with new_directory(path) as new:
        bare = Manifest(step=manifest.step, best=manifest.best, state=manifest.state)
        if not to_shards:
            _fill(new, bare, whole.weights, whole.optimizer, None)
        else:
            rest = {key: value for key, value in whole.optimizer.items() if key != "moments"}
            kinds = {sharded.WEIGHTS: whole.weights} | whole.optimizer["moments"]
            named = {
                f"{kind}/{name}": tensor
                for kind, group in kinds.items()
                for name, tensor in group.items()
            }
            _fill(new, bare, {}, rest, lambda place: sharded.write_shards(place, named))
    return True


def load(path: Path, which: Which = "last", *, with_optimizer: bool = True) -> Checkpoint:
    """The checkpoint at ``path``, or that of the run at ``path`` which ``which`` names.

    Every file is checked against its SHA-256 first. Raises ``UserError`` if there is no such
    checkpoint; if it is damaged, the message names the file and the whole checkpoint before it.
    """
    path = Path(path)
    directory = find(path, which)
    try:
        return _read(directory, with_optimizer)
    except DamagedCheckpointError as error:
        if not directory.exists() and find(path, which) != directory:
            # A training process pruned it while we looked: there is a newer one.
            return load(path, which, with_optimizer=with_optimizer)
        raise DamagedCheckpointError(error.file, error.what + _advice(directory)) from error


def load_weights(path: Path, which: Which = "best") -> dict[str, Tensor]:
    """Weights alone, by parameter name: of a checkpoint, or of a run (its best one, else its last)."""
    path = Path(path)
    return load(path, _chosen(path) if which == "best" else which, with_optimizer=False).weights


def find(path: Path, which: Which = "last") -> Path:
    """The checkpoint directory that ``load`` would read.

    Raises ``UserError`` if there is none, and where a damaged one may be the best.
    """
    run, step = folder.locate(path)
    known = folder.steps(run)
    if step is None:
        if not known:
            raise UserError(f"{run} has no checkpoint yet: remove it and begin anew")
        if which == "best":
            step = _best(run)
            if step is None:
                raise UserError(f"{run} has no best checkpoint yet; take the last one")
        else:
            step = known[-1] if which == "last" else which
    if step not in known:
        held = ", ".join(map(str, known)) or "none"
        raise UserError(f"{run} has no checkpoint of step {step}; it has: {held}")
    return folder.step_directory(run, step)


def find_chosen(path: Path) -> Path:
    """The checkpoint that ``path`` stands for: itself, or a run's best one, else its last.

    Raises ``UserError`` as ``find`` does.
    """
    return find(path, _chosen(path))


def _chosen(path: Path) -> Which:
    run, step = folder.locate(path)
    return "best" if step is None and _best(run) is not None else "last"


def _best(run: Path) -> int | None:
    try:
        return folder.best_step(run, certain=True)
    except DamagedCheckpointError as error:
        advice = _advice(error.file.parent)
        raise DamagedCheckpointError(error.file, error.what + advice) from error


def _fill(
    new: Path,
    manifest: Manifest,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any],
    shards: Callable[[Path], None] | None,
) -> None:
    if shards is None:
        _save_weights(new / WEIGHTS, weights)
        names = [WEIGHTS, OPTIMIZER]
    else:
        (new / sharded.NAME).mkdir()
        shards(new / sharded.NAME)
        names = [*sharded.files_of(new / sharded.NAME), OPTIMIZER]
    _save_optimizer(new / OPTIMIZER, optimizer)
    files = {name: file_facts(new / name) for name in names}
    write_manifest(new, replace(manifest, files=files))


def _is_sharded(manifest: Manifest) -> bool:
    return WEIGHTS not in manifest.files


def _read(directory: Path, with_optimizer: bool) -> Checkpoint:
    manifest = read_manifest(directory)
    in_parts = _is_sharded(manifest)
    names = [name for name in manifest.files if with_optimizer or name != OPTIMIZER]
    check_files(directory, manifest, names)
    optimizer: dict[str, Any] = {}
    with clear_errors(directory, "read"):
        if with_optimizer:
            optimizer = torch.load(directory / OPTIMIZER, map_location="cpu", weights_only=True)
        if in_parts:
            only = None if with_optimizer else sharded.WEIGHTS
            kinds = sharded.read_shards(directory / sharded.NAME, only)
            weights = kinds.pop(sharded.WEIGHTS)
            optimizer = {"moments": kinds} | optimizer if with_optimizer else {}
        else:
            weights = load_file(directory / WEIGHTS)
    return Checkpoint(
        step=manifest.step,
        weights=weights,
        optimizer=optimizer,
        state=manifest.state,
        path=directory,
    )


def _advice(directory: Path) -> str:
    """What to do about a damaged checkpoint: the newest whole one before it, looked for and checked."""
    run, step = folder.locate(directory)
    for earlier in reversed([known for known in folder.steps(run) if step and known < step]):
        candidate = folder.step_directory(run, earlier)
        try:
            check_files(candidate, read_manifest(candidate))
        except UserError:
            continue
        return f"; the checkpoint before it is whole: --resume {shlex.quote(str(candidate))}"
    return "; no whole checkpoint stands before it: the run must be trained anew"


def _save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    tensors = {name: _plain(tensor) for name, tensor in weights.items()}
    _assert_no_aliases(tensors)
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])  # on Windows a code of its own, which OSError translates
        raise OSError(code, os.strerror(code), str(path), code) from error
    path.chmod(mode)  # safetensors writes for the owner alone, whatever the umask says


def _save_optimizer(path: Path, optimizer: dict[str, Any]) -> None:
    with path.open("wb") as file:
        sink = _Sink(file)
        try:
            torch.save(_plain_tree(optimizer), cast(IO[bytes], sink))
        except RuntimeError:
            if sink.error is None:
                raise
        if sink.error is not None:
            raise sink.error


class _Sink:
    """A file for ``torch.save`` that remembers the system's error, which torch replaces by its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _plain_tree(value: Any) -> Any:
    """``value`` with CPU tensors that own their storage (a view would drag a whole arena along)."""
    if isinstance(value, Tensor):
        plain = _plain(value)
        whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        return plain if whole else plain.clone()
    if isinstance(value, dict):
        return {key: _plain_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain_tree(item) for item in value)
    assert value is None or type(value) in (bool, int, float, str, bytes), (
        f"{type(value)} would not load again with weights_only=True"
    )
    return value


def _assert_no_aliases(tensors: dict[str, Tensor]) -> None:
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), name)
        for name, tensor in tensors.items()
        if tensor.numel()
    )
    for (_, end, first), (start, _, second) in pairwise(spans):
        assert start >= end, f"{first} and {second} share memory: give a tied weight once"
