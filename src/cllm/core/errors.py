"""Errors that are the user's to mend, and the exit code each one ends with.

A ``UserError`` is one line that says what is wrong and how to mend it; the command line prints it
without a traceback. What is our own mistake is an assertion and keeps its traceback.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class UserError(Exception):
    """The user's mistake (or their machine's): one line, exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """A wrong option, key or value: exit code 2, as command lines have it."""

    exit_code = 2


class SettingError(UsageError, ValueError):
    """A setting, or a combination of them, that cannot be: from Python it is a ``ValueError``, too."""


@contextmanager
def value_errors_as(kind: type[UserError]) -> Iterator[None]:
    """Within it a ``ValueError`` is the user's mistake: it goes on as one of ``kind``, with its words."""
    try:
        yield
    except ValueError as error:
        raise kind(str(error)) from error


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """`` (did you mean 'x'?)`` for the known word closest to ``word``, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or raise a ``UserError`` that names the ``pip install`` line."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs the package {module.split('.')[0]!r}: pip install 'cllm[{extra}]'"
        ) from error
