"""Files and directories that are either whole or not there.

What is written gets a temporary name beside its place, is flushed to the disk, and is renamed. A
process that is killed in between leaves only the temporary, which the next opening of the run removes
(``clean_leftovers``). What the system refuses (full disk, no permission) becomes one line.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cllm.core.errors import UserError
from cllm.core.process import host_name, start_time, this_process

PREFIX = ".tmp-"
"""Every temporary name begins so; the name of its process follows."""

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another place (--out)",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another place (--out)",
    errno.EFBIG: "the file would be larger than allowed here; raise the limit (ulimit -f) or choose "
    "another place (--out)",
    errno.EACCES: "no permission; choose another place (--out) or change the permissions",
    errno.EPERM: "no permission; choose another place (--out) or change the permissions",
    errno.EROFS: "the file system is read-only; choose another place (--out)",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one (--out)",
    errno.ENOTDIR: "a part of this path is a file, not a directory; choose another place (--out)",
}


@contextmanager
def clear_errors(path: Path, doing: str = "write") -> Iterator[None]:
    """Turn an ``OSError`` of the body into a ``UserError`` that names ``path`` and the remedy."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
        raise UserError(f"cannot {doing} {path}: {reason}") from error


def temporary_beside(path: Path) -> Path:
    """A fresh name in the directory of ``path`` that tells which process made it."""
    me = this_process()
    owner = f"{me.pid}.{_tag(me.host)}-{_tag(me.started)}"
    return path.with_name(f"{PREFIX}{path.name}.{owner}.{secrets.token_hex(4)}")


def _tag(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at ``path``, whole and flushed, when the body ends well.

    If the body fails, nothing is left and an older file at ``path`` is untouched. Raises ``UserError``.
    """
    temporary = temporary_beside(path)
    with clear_errors(path):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                flush_to_disk(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        flush_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the file at ``path`` by ``text`` (UTF-8, no translation of line ends), atomically."""
    with new_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace the file at ``path`` by ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with new_file(path) as file:
        # The name of a file can hold bytes that are no UTF-8; "\udc80" is how JSON writes them.
        file.write(text.encode("utf-8", "backslashreplace"))


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory that appears at ``path``, every file flushed, when the body ends well.

    Yields the temporary directory to fill. A directory that stands at ``path`` is replaced; if the body
    fails it is untouched and nothing is left. Raises ``UserError``.
    """
    temporary = temporary_beside(path)
    with clear_errors(path):
        try:
            temporary.mkdir()
            yield temporary
            flush_tree(temporary)
            older = _moved_away(path)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if older is not None:
            _delete(older)
        flush_directory(path.parent)


def remove(path: Path) -> None:
    """Delete a file or directory so that a kill leaves it whole or under a temporary name only."""
    with clear_errors(path, "remove"):
        doomed = _moved_away(path)
        if doomed is not None:
            _delete(doomed)


def _moved_away(path: Path) -> Path | None:
    """Give what stands at ``path`` a temporary name; ``None`` if nothing stands there."""
    doomed = temporary_beside(path)
    try:
        os.replace(path, doomed)
    except FileNotFoundError:
        return None
    return doomed


def leftovers(directory: Path, *, alone: bool = False) -> list[Path]:
    """Temporaries in ``directory`` whose process no longer lives.

    ``alone``: the caller holds the run's lock, so that every temporary of another process is one.
    """
    if not directory.is_dir():
        return []
    found = sorted(path for path in directory.iterdir() if path.name.startswith(PREFIX))
    return [path for path in found if not _writer_lives(path, alone)]


def clean_leftovers(directory: Path, *, alone: bool = False) -> list[Path]:
    """Delete the temporaries that killed processes left in ``directory``; returns what was deleted."""
    gone = leftovers(directory, alone=alone)
    for path in gone:
        with clear_errors(path, "remove"):
            _delete(path)
    return gone


def _writer_lives(path: Path, alone: bool) -> bool:
    """Whether the process named in a temporary's name is (or may be) at work."""
    match = re.search(r"\.(\d+)\.(\w{8})-(\w{8})\.\w{8}$", path.name)
    if match is None:
        return False
    pid, host, started = int(match[1]), match[2], match[3]
    if alone:
        return pid == os.getpid() and host == _tag(host_name())
    if host != _tag(host_name()):
        # Another machine (or a container gone since) cannot be asked; nothing takes us a day to write.
        with suppress(OSError):
            return time.time() - path.stat().st_mtime < 86_400
        return False
    now = start_time(pid)
    return now is not None and _tag(now) == started


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def point(link: Path, target: str) -> None:
    """Make ``link`` point at its sibling ``target``, atomically.

    A relative symbolic link; a file of one line with the name where there are none (some network
    shares) or where they need privileges and cannot be replaced in one move (Windows).
    """
    temporary = temporary_beside(link)
    with clear_errors(link):
        if not _symlinked(temporary, target):
            write_text(link, target + "\n")
            return
        try:
            os.replace(temporary, link)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        flush_directory(link.parent)


def _symlinked(path: Path, target: str) -> bool:
    """Whether ``path`` could be made a link to ``target`` that one move puts in another's place."""
    if os.name == "nt" or not hasattr(os, "symlink"):
        return False
    try:
        path.symlink_to(target, target_is_directory=True)
    except OSError:
        return False
    return True


def pointed_at(link: Path) -> str | None:
    """The name of the sibling that ``link`` (see ``point``) points at, or ``None``."""
    if link.is_symlink():
        return Path(os.readlink(link)).name
    if link.is_file():
        return link.read_text(encoding="utf-8").strip() or None
    return None


def flush_to_disk(descriptor: int) -> None:
    """Have the system write an open file down to the medium itself."""
    try:
        import fcntl
    except ImportError:  # Windows
        os.fsync(descriptor)
        return
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:  # macOS: fsync alone stops at the drive's cache
        with suppress(OSError):
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def flush_directory(path: Path) -> None:
    """Have the system write a directory's entries down, so that a rename outlives a power cut."""
    if os.name == "nt":  # directories cannot be opened there, and renames are journalled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def flush_tree(path: Path) -> None:
    """Flush every file below ``path`` and the directories themselves."""
    for parent, _, names in os.walk(path):
        for name in names:
            file = Path(parent, name)
            if not file.is_symlink():
                descriptor = os.open(file, os.O_RDWR)
                try:
                    flush_to_disk(descriptor)
                finally:
                    os.close(descriptor)
        flush_directory(Path(parent))
