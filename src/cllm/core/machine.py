"""Facts about this machine, asked once: what `cllm info`, reports and benches say of it.

torch is imported only by the functions that need it, so that the command line starts at once.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cllm.core import cgroup
from cllm.core.cpu import cores, cpu_model, instruction_sets, is_busy, load_average, usable_threads
from cllm.core.memory import available_memory, memory_limit, total_memory


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What does not change while we run. Memory in bytes."""

    system: str
    cpu: str
    processors: int
    """Logical processors of the machine."""
    cores: int
    """Those that this process may run on."""
    quota: float | None
    """Processors' worth of time that a cgroup grants, or ``None``."""
    threads: int
    """Threads that can run at once: the smaller of the two, rounded up."""
    instruction_sets: tuple[str, ...]
    memory: int | None
    memory_limit: int | None
    """A cgroup's limit below ``memory``, or ``None``."""


@cache
def machine() -> Machine:
    """This machine."""
    return Machine(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        cpu=cpu_model(),
        processors=os.cpu_count() or 1,
        cores=cores(),
        quota=cgroup.cpu_quota(),
        threads=usable_threads(),
        instruction_sets=instruction_sets(),
        memory=total_memory(),
        memory_limit=memory_limit(),
    )


def cache_dir() -> Path:
    """The user's cache directory for cllm (it may not exist yet).

    ``$CLLM_CACHE`` if set; else the system's place: ``$XDG_CACHE_HOME/cllm`` or ``~/.cache/cllm``,
    ``~/Library/Caches/cllm`` on macOS, ``%LOCALAPPDATA%\\cllm\\cache`` on Windows.
    """
    chosen = os.environ.get("CLLM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "cllm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "cllm" / "cache"
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    # The XDG specification has relative paths ignored.
    return (base if base.is_absolute() else home / ".cache") / "cllm"


@cache
def cpp_compiler() -> str | None:
    """The C++ compiler that torch's Inductor would call, if it runs; otherwise ``None``."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX") or default
    found = shutil.which(compiler)
    if found is None:
        return None
    try:
        # Without the developer tools, macOS's clang++ is there but fails. cl knows no --version.
        question = [found] if sys.platform == "win32" else [found, "--version"]
        subprocess.run(question, capture_output=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return compiler


def cannot_compile() -> str | None:
    """Why ``torch.compile`` cannot work on the CPU here, or ``None`` if nothing speaks against it."""
    if cpp_compiler() is None:
        return "no C++ compiler was found (install g++ or clang++, or set CXX)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"Python's header {header.name} is missing (install the python3-dev package)"
    if sys.platform == "linux" and not _compiler_works():
        return f"the C++ compiler {cpp_compiler()} failed on a small OpenMP program"
    return None


@cache
def _compiler_works() -> bool:
    """Whether the compiler makes a library of the kind that Inductor asks of it (GNU's options)."""
    program = "#include <omp.h>\n#include <vector>\nint f() { return omp_get_max_threads(); }\n"
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "trial.so"
        options = ["-shared", "-fPIC", "-fopenmp", "-x", "c++", "-", "-o", str(made)]
        try:
            subprocess.run(
                [str(cpp_compiler()), *options],
                input=program,
                text=True,
                capture_output=True,
                check=True,
                timeout=60,
            )
        except (OSError, subprocess.SubprocessError):
            return False
        return made.is_file()


def torch_version() -> str:
    """torch's version as installed, without importing it."""
    return importlib.metadata.version("torch")


def torch_build() -> str:
    """torch's version and the parts it was built with, as one line. Imports torch."""
    import torch

    parts = [torch.__version__, f"vectors {torch.backends.cpu.get_cpu_capability()}"]
    checks = {
        "oneDNN": torch.backends.mkldnn.is_available(),
        "MKL": torch.backends.mkl.is_available(),
        "OpenMP": torch.backends.openmp.is_available(),
        "CUDA": torch.cuda.is_available(),
        "MPS": torch.backends.mps.is_available(),
    }
    return ", ".join(parts + [name for name, there in checks.items() if there])


def describe() -> list[tuple[str, str]]:
    """(name, value) rows about this machine for people. Imports torch."""
    here, load = machine(), load_average()
    limit = "" if here.memory_limit is None else f", limited to {gibibytes(here.memory_limit)}"
    return [
        ("system", here.system),
        ("python", platform.python_version()),
        ("processor", here.cpu),
        ("cores", f"{here.cores} of {here.processors} usable"),
        ("cpu quota", "none" if here.quota is None else f"{here.quota:g} processors (cgroup)"),
        ("instruction sets", " ".join(here.instruction_sets) or "none known"),
        (
            "memory",
            f"{gibibytes(here.memory)}{limit}, {gibibytes(available_memory())} available",
        ),
        ("load", "unknown" if load is None else f"{load:.2f}; {is_busy() or 'free for us'}"),
        ("torch", torch_build()),
        ("compiler", cannot_compile() or f"{cpp_compiler()}"),
        ("cache", str(cache_dir())),
    ]


def gibibytes(size: int | None) -> str:
    """``size`` bytes for people, ``unknown`` for ``None``."""
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
