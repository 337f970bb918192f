"""C++ sources of the package, compiled once for each machine and kept in the user's cache.

It stands on the lowest floor that needs it, and like all of that floor imports nothing of the house.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Function = Callable[[Any], None]
"""A compiled function, of a reference to a structure of arguments."""
_LOCK = threading.Lock()

# No exceptions of floating point are read, so that rounding and choices may be vectorised.
OPTIONS = ("-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# Clang calls it -mcpu on Arm; an old compiler on a new machine may know neither.
TARGETS = (("-march=native",), ("-mcpu=native",), ())


class CannotCompileError(Exception):
    """There is no compiler, or it failed; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """A shared library of one source file. ``options``: beside ``OPTIONS``."""

    source: Path
    options: tuple[str, ...] = ()

    def path(self) -> Path:
        """Where it lies once it is compiled: a name for each source, compiler and processor."""
        facts = [self.source.read_text(encoding="utf-8"), _compiler(), repr((OPTIONS, TARGETS))]
        facts += [*self.options, _processor()]
        key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
        return _cache() / f"{self.source.stem}-{key}.so"

    def compile(self) -> Path:
        """Compile it, unless it is there; takes seconds. Raises ``CannotCompileError``."""
        if sys.platform == "win32":
            raise CannotCompileError("compiled kernels are not built on Windows")
        compiler = shutil.which(_compiler())
        if compiler is None:
            raise CannotCompileError(
                f"there is no C++ compiler {_compiler()} (install one, or set CXX)"
            )
        path, error = self.path(), ""
        if path.is_file():
            return path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as place:
                made = Path(place) / path.name
                for target in TARGETS:
                    command = [compiler, *OPTIONS, *self.options, *target, str(self.source)]
                    done = subprocess.run(
                        [*command, "-o", str(made)], capture_output=True, text=True, timeout=300
                    )
                    if done.returncode == 0:
                        made.replace(path)  # whole at once: another process may look
                        return path
                    error = error or _reason(done.stderr)
        except (OSError, subprocess.SubprocessError) as problem:
            error = str(problem)
        raise CannotCompileError(f"{_compiler()} failed: {error}")


def functions(
    library: Library, names: tuple[str, ...], arguments: type[ctypes.Structure]
) -> tuple[Function, ...] | str:
    """Functions of ``library`` that take ``arguments``, compiled at the first call of a process; or in one
    line why there are none."""
    with _LOCK:
        return _functions(library, names, arguments)


@cache
def _functions(
    library: Library, names: tuple[str, ...], arguments: type[ctypes.Structure]
) -> tuple[Function, ...] | str:
    try:
        loaded = ctypes.CDLL(str(library.compile()))
    except CannotCompileError as error:
        return str(error)
    found = tuple(getattr(loaded, name) for name in names)
    for function in found:
        function.argtypes, function.restype = [ctypes.POINTER(arguments)], None
    return found


def _reason(stderr: str) -> str:
    """The first line that is an error's, else the first: a compiler may warn before it fails."""
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line.lower()), lines[0])


def _compiler() -> str:
    """The one that Inductor would call."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def _cache() -> Path:
    """The folder ``kernels`` of the user's cache for cllm (see ``cllm.core.machine.cache_dir``, which is
    on another floor; a test compares the two)."""
    chosen = os.environ.get("CLLM_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "kernels"
    home, base = Path.home(), Path(os.environ.get("XDG_CACHE_HOME") or "")
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "cllm" / "kernels"
    return (base if base.is_absolute() else home / ".cache") / "cllm" / "kernels"


def _processor() -> str:
    """What machine code depends on; a home directory may be shared between machines."""
    facts = [platform.system(), platform.machine(), platform.processor()]
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(errors="replace").splitlines()
        keys = ("model name", "flags", "Features", "CPU part")
        facts += [next((line for line in lines if line.startswith(key)), "") for key in keys]
    return "\n".join(facts)
