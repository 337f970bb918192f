"""A run in the making: built under a temporary name, so that a command that fails leaves nothing."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Self

from cllm.core.atomic import (
    clean_leftovers,
    clear_errors,
    flush_directory,
    flush_tree,
    temporary_beside,
)
from cllm.core.errors import UserError
from cllm.store.run import RunDirectory, is_run
from cllm.store.status import Status, now, write_status


class Draft:
    """A new run directory until ``commit``; a context manager that removes it otherwise.

    ``run`` has the places to write to meanwhile. Raises ``UserError`` at once if the target is a run
    already, holds other files, or cannot be written.
    """

    def __init__(
        self, out: Path | str | None = None, *, corpus: str = "run", root: Path | str = "runs"
    ):
        """``out``: the run directory to make; without it ``root/<date>-<corpus>-<n>``."""
        self._numbered = None if out is not None else (Path(root), _slug(corpus))
        self.target = Path(out) if out is not None else _free_name(Path(root), _slug(corpus))
        _refuse_taken(self.target)
        self._made: list[Path] = []
        self._committed = False
        self._inside = self.target.is_dir()
        place = self.target / "draft" if self._inside else self.target
        with clear_errors(self.target):
            self._make_parents(place.parent)
            clean_leftovers(place.parent)
            temporary = temporary_beside(place)
            temporary.mkdir()
        self.run = RunDirectory(temporary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._committed:
            self.discard()

    def commit(self) -> RunDirectory:
        """Give the directory its name; ``run.toml`` must be written. Returns the run.

        Files in it must be closed or reopened under their new names. Raises ``UserError`` if the disk
        refuses or the name was taken meanwhile.
        """
        assert self.run.config.is_file(), "a run without run.toml cannot be opened again"
        write_status(self.run.path, Status(state="new", created=now()))
        with clear_errors(self.target):
            flush_tree(self.run.path)
            if self._inside:
                self._move_inside()
            else:
                self._move()
            flush_directory(self.target.parent)
        self._committed = True
        return RunDirectory(self.target)

    def discard(self) -> None:
        """Remove the draft, and the directories above it that were made for it."""
        shutil.rmtree(self.run.path, ignore_errors=True)
        for made in reversed(self._made):
            with suppress(OSError):  # someone else put something there
                made.rmdir()

    def _make_parents(self, parent: Path) -> None:
        missing = [path for path in (parent, *parent.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._made.append(path)

    def _move(self) -> None:
        while True:
            try:
                _rename_to_new(self.run.path, self.target)
                return
            except FileExistsError:
                if self._numbered is None:
                    _refuse_taken(self.target)
                    raise
                # Another process took our number while we prepared the corpus.
                self.target = _free_name(*self._numbered)

    def _move_inside(self) -> None:
        """Into an empty directory that existed (perhaps a mount point): what makes it a run goes last."""
        _refuse_taken(self.target)
        last = ["run.toml", "status.json"]
        names = [path.name for path in self.run.path.iterdir() if path.name not in last]
        moved: list[str] = []
        try:
            for name in names + last:
                os.replace(self.run.path / name, self.target / name)
                moved.append(name)
        except BaseException:
            for name in moved:
                with suppress(OSError):
                    os.replace(self.target / name, self.run.path / name)
            raise
        self.run.path.rmdir()


def _rename_to_new(source: Path, target: Path) -> None:
    # POSIX rename would silently replace an empty directory, which another process may have just made.
    if target.exists():
        raise FileExistsError(target)
    try:
        os.rename(source, target)
    except OSError:
        if target.exists():
            raise FileExistsError(target) from None
        raise


def _refuse_taken(target: Path) -> None:
    if is_run(target):
        raise UserError(
            f"{target} is a run already: go on with --resume {target}, or choose another --out"
        )
    if target.is_dir():
        with clear_errors(target, "read"):
            foreign = [path for path in target.iterdir() if not path.name.startswith(".tmp-")]
        if foreign:
            raise UserError(f"{target} is not empty ({foreign[0].name}…): choose another --out")
    elif target.exists() or target.is_symlink():
        raise UserError(f"{target} is a file, not a directory: choose another --out")


def _free_name(root: Path, corpus: str) -> Path:
    stem = f"{date.today().isoformat()}-{corpus}"
    number = 1
    while (root / f"{stem}-{number}").exists():
        number += 1
    return root / f"{stem}-{number}"


def _slug(text: str) -> str:
    """``text`` as a part of a directory name on any system."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:40].lower() or "run"
