"""Writing a run in another program's format, and opening what was written in that program."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cllm.core.atomic import (
    clean_leftovers,
    clear_errors,
    flush_directory,
    flush_to_disk,
    new_directory,
    temporary_beside,
)
from cllm.core.errors import UsageError, require
from cllm.export.check import Checked, CheckFailedError, check
from cllm.export.formats import Format, FormatModule, find_dtype, find_format
from cllm.export.marks import obstacle
from cllm.export.source import Source, open_source
from cllm.model.transformer import Transformer
from cllm.store.container import is_container
from cllm.store.run import RunDirectory


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    path: Path
    format: str
    dtype: str
    bytes: int
    checked: Checked | None
    """None where it was not checked."""


def export(
    run: Path | str,
    to: str,
    *,
    out: Path | str | None = None,
    dtype: str | None = None,
    force: bool = False,
    checking: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Export the run, checkpoint or compressed file at ``run`` to the format ``to``.

    ``out``: the file or directory to make; none means one in the run's folder ``export``, or beside the
    compressed file. ``dtype``: how weights are stored; none means the format's default, or that of the
    blocks which a compressed file holds and the format stores as they are. ``force``: replace an earlier
    export. ``checking``: open the file in the program that it is for and compare. ``say`` is told of each
    stage. Raises ``UserError`` where the run, the place or the model does not allow it; then nothing was
    written.
    """
    target = find_format(to)
    chosen = find_dtype(target, dtype)
    place = Path(out) if out is not None else None
    if place is not None:
        _refuse_place(place, target, force)
    if checking and target.checked_by:  # before minutes of writing, not after them
        require(target.checked_by, target.name, f"checking an export to {target.name} (--check)")
    source = open_source(Path(run))
    kinds = sorted({kind for kind, _ in source.blocks.values()} & set(target.dtypes))
    if kinds:
        chosen = chosen if dtype else kinds[0]
        count = len(source.blocks)
        say(f"{count} matrices are in blocks of {' and '.join(kinds)} and go over byte for byte")
    if place is None:
        place = default_place(Path(run), source, target, chosen)
        _refuse_place(place, target, force)
    module = target.load()
    with _new(place, target) as temporary:
        if target.note:
            say(target.note)
        say(f"writing {target.name} ({chosen})")
        reference = module.write(source, chosen, temporary)
        checked = None
        if checking:
            say("opening it in the program that it is for")
            checked = _checked(module, temporary, reference, source)
    return Exported(place, target.name, chosen, _size(place), checked)


def _checked(module: FormatModule, path: Path, reference: Transformer, source: Source) -> Checked:
    with closing(module.open_runtime(path)) as runtime:
        try:
            return check(runtime, reference, source)
        except CheckFailedError as error:
            raise CheckFailedError(
                f"{error}; nothing was written (--no-check writes it all the same)"
            ) from error


def default_place(run: Path, source: Source, target: Format, dtype: str) -> Path:
    """Where an export goes if nothing is said: the folder ``export`` of the run, or beside a file."""
    folder = run.parent if is_container(run) else RunDirectory.open(run).path / "export"
    tag = "" if dtype == target.dtypes[0] else f"-{dtype}"
    return folder / f"{source.name}{tag}{target.suffix}"


def _refuse_place(place: Path, target: Format, force: bool) -> None:
    if not place.name.endswith(target.ending):
        raise UsageError(f"files for {target.name} end in {target.ending}, unlike {place}")
    if not place.exists():
        return
    if not force:
        raise UsageError(f"{place} exists; --force replaces it, --out names another place")
    if place.is_dir() != target.directory:
        kind, other = ("file", "directory") if target.directory else ("directory", "file")
        raise UsageError(f"{place} is a {kind}, and {target.name} makes a {other}; choose --out")
    foreign = obstacle(place, target)
    if foreign:
        raise UsageError(
            f"{place} is no earlier {target.name} export by cllm alone ({foreign}): remove it yourself, "
            "or choose --out"
        )


@contextmanager
def _new(place: Path, target: Format) -> Iterator[Path]:
    """A path to write to, which becomes ``place`` when the body ends well; else nothing is left.

    The file has its final name, in a temporary directory: some programs go by the suffix.
    """
    with clear_errors(place):
        if place.parent.exists() and not place.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(place.parent))
        made_parent = not place.parent.exists()
        place.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(place.parent)
    try:
        with _new_directory(place) if target.directory else _new_file(place) as temporary:
            yield temporary
    except BaseException:
        if made_parent:
            with suppress(OSError):  # someone else wrote there meanwhile
                place.parent.rmdir()
        raise


@contextmanager
def _new_directory(place: Path) -> Iterator[Path]:
    with new_directory(place) as temporary:
        temporary.rmdir()  # the format makes it
        yield temporary


@contextmanager
def _new_file(place: Path) -> Iterator[Path]:
    folder = temporary_beside(place)
    with clear_errors(place):
        try:
            folder.mkdir()
            yield folder / place.name
            with (folder / place.name).open("r+b") as file:
                flush_to_disk(file.fileno())
            os.replace(folder / place.name, place)
            flush_directory(place.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
