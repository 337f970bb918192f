"""From what the user names (files, directories, globs, ``hf:NAME``) to the sources of a corpus."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cllm.core.errors import UserError, nearest
from cllm.text.builtin import BuiltinSource
from cllm.text.decode import decode_blocks, read_blocks
from cllm.text.document import Document
from cllm.text.fingerprint import Fingerprint
from cllm.text.hashing import file_sha256
from cllm.text.html import html_text
from cllm.text.hub import PREFIX, HubSource
from cllm.text.notes import Notes
from cllm.text.records import json_documents

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".html", ".htm")
PACKED_SUFFIXES = (".gz", ".zst")


class Source(Protocol):
    """Something that documents come from, always in the same order."""

    @property
    def name(self) -> str:
        """What the user calls it."""

    def fingerprint(self) -> Fingerprint:
        """Its size and content hash."""

    def documents(self, field: str, notes: Notes) -> Iterator[Document]:
        """Its documents as they are read; ``field`` holds a record's text."""


@dataclass(frozen=True)
class FileSource:
    """One file; its suffix tells how it is read, an unknown one is plain text."""

    path: Path

    @property
    def name(self) -> str:
        """The path as given."""
        return self.path.as_posix()

    @property
    def kind(self) -> str:
        """The suffix under ``.gz`` and ``.zst``, in lower case."""
        path = self.path
        return Path(path.stem).suffix.lower() if is_packed(path) else path.suffix.lower()

    def fingerprint(self) -> Fingerprint:
        """Of the file as it is on disk."""
        try:
            return Fingerprint(self.name, self.path.stat().st_size, file_sha256(self.path))
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error

    def documents(self, field: str, notes: Notes) -> Iterator[Document]:
        """A plain file is one document, in pieces; a page is one; a JSONL file has one a line."""
        pieces = decode_blocks(read_blocks(self.path), self.name, notes)
        if self.kind == ".jsonl":
            yield from json_documents(pieces, self.name, field, notes)
        elif self.kind in (".html", ".htm"):
            before = len(notes.problems)
            page = "".join(pieces)
            if len(notes.problems) == before:
                yield Document(self.name, html_text(page, self.name))
        else:
            for number, piece in enumerate(pieces):
                yield Document(self.name, piece, continues=number > 0)


def is_packed(path: Path) -> bool:
    """Whether the suffix says that the file is compressed."""
    return path.suffix.lower() in PACKED_SUFFIXES


def is_text(path: Path) -> bool:
    """Whether a directory's file is taken: by its suffix, under ``.gz``/``.zst`` too."""
    return FileSource(path).kind in TEXT_SUFFIXES


def expand(paths: Sequence[str]) -> list[Source]:
    """The sources that ``paths`` name, sorted within each, no file twice; none given: built-in.

    Raises ``UserError`` for a missing file, a directory without text files, a glob without a match.
    """
    if not paths:
        return [BuiltinSource()]
    sources, seen = list[Source](), set[str]()
    for path in paths:
        found = [HubSource.parse(path)] if path.startswith(PREFIX) else _files(path)
        for source in found:
            identity = (
                source.name if isinstance(source, HubSource) else os.path.realpath(source.path)
            )
            if identity not in seen:
                seen.add(identity)
                sources.append(source)
    return sources


def _files(path: str) -> list[FileSource]:
    here = Path(path).expanduser()
    if here.is_dir():
        return [FileSource(file) for file in _inside(here)]
    if here.exists():
        return [FileSource(here)]
    if glob.has_magic(path):
        return [FileSource(file) for file in _matches(path, str(here))]
    names = [p.name for p in here.parent.iterdir()] if here.parent.is_dir() else []
    raise UserError(f"there is no file or directory {path!r}{nearest(here.name, names)}")


def _inside(directory: Path) -> list[Path]:
    """Text files below a directory, hidden ones left out, sorted by path."""
    found = list[Path]()
    for folder, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, n) for n in files if not n.startswith(".") and is_text(Path(n))]
    if not found:
        raise UserError(
            f"the directory {str(directory)!r} holds no text files ({' '.join(TEXT_SUFFIXES)}, also "
            ".gz and .zst of these); name other files one by one or by a glob such as '*.py'"
        )
    return sorted(found, key=lambda p: p.as_posix())


def _matches(pattern: str, expanded: str) -> list[Path]:
    """Files that a glob matches; one without a suffix of its own takes text files only."""
    matches = [Path(m) for m in glob.glob(expanded, recursive=True) if os.path.isfile(m)]
    if not Path(pattern).suffix:
        matches = [m for m in matches if is_text(m)]
    if not matches:
        raise UserError(f"no text file matches {pattern!r}")
    return sorted(matches, key=lambda p: p.as_posix())
