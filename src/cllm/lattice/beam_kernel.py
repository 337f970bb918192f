"""The kernel of K-best, compiled from beam.cpp once for each machine and kept in the user's cache."""

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
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cllm.lattice.beam import Tree

SOURCE = Path(__file__).with_name("beam.cpp")
# Rows of ``effects`` and of beams are padded to whole products.
STRIP = 16
REALS = {torch.float32: "float", torch.float64: "double"}
# No exceptions of floating point are read, so that rounding and choices may be vectorised; costs are
# ordered by their bits.
OPTIONS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
)
# Clang calls it -mcpu on Arm; an old compiler on a new machine may know neither.
TARGETS = (("-march=native",), ("-mcpu=native",), ())

Run = Callable[["Tree", slice, int, int, bool, Tensor], None]
_LOCK = threading.Lock()


class _Arguments(ctypes.Structure):
    """beam.cpp's ``Arguments``."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("m", "n", "stride", "K", "children", "keep_first")],
        *[
            (name, ctypes.c_void_p)
            for name in ("opened", "effects", "squares", "low", "high", "step", "offset", "base")
        ],
        ("classes", ctypes.c_void_p),
        ("costs", ctypes.c_void_p),
        ("magnitudes", ctypes.c_int64),
        ("out", ctypes.c_void_p),
    ]


def load(dtype: torch.dtype) -> Run | str:
    """The kernel for a dtype, or in one line why there is none."""
    with _LOCK:
        return _load(dtype)


@cache
def _load(dtype: torch.dtype) -> Run | str:
    made = _compiled(REALS[dtype])
    if isinstance(made, str):
        return made
    kernel = ctypes.CDLL(str(made)).beam
    kernel.argtypes, kernel.restype = [ctypes.POINTER(_Arguments)], None

    def run(tree: Tree, part: slice, K: int, children: int, keep_first: bool, out: Tensor) -> None:
        n = tree.opened.shape[1]
        stride = -(-n // STRIP) * STRIP
        effects = tree.effects.new_zeros(n, stride)
        effects[:, :n] = tree.effects
        classes, costs = None, None
        if tree.prices is not None:
            classes, costs = tree.prices.classes, tree.prices.costs
        rows = {
            name: None if tensor is None else tensor[part]
            for name, tensor in (
                ("opened", tree.opened),
                ("step", tree.step),
                ("offset", tree.offset),
                ("base", tree.base),
                ("classes", classes),
                ("out", out),
            )
        }
        shared = {"effects": effects, "squares": tree.squares, "low": tree.low, "high": tree.high}
        tensors = rows | shared | {"costs": costs}
        for name, tensor in tensors.items():
            wanted = torch.uint8 if name == "classes" else dtype
            assert tensor is None or (tensor.is_contiguous() and tensor.dtype == wanted), name
        kernel(
            _Arguments(
                m=part.stop - part.start,
                n=n,
                stride=stride,
                K=K,
                children=children,
                keep_first=keep_first,
                magnitudes=0 if costs is None else costs.shape[1],
                **{k: None if t is None else t.data_ptr() for k, t in tensors.items()},
            )
        )

    return run


def _compiled(real: str) -> Path | str:
    """The library for ``real``, compiled now or before; or why not."""
    if sys.platform == "win32":
        return "compiled kernels are not built on Windows"
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    compiler = shutil.which(name)
    if compiler is None:
        return f"there is no C++ compiler {name} (install one, or set CXX)"
    facts = [SOURCE.read_text(encoding="utf-8"), compiler, real, repr(OPTIONS), _processor()]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    path = _cache() / f"beam-{real}-{key}.so"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole at once: another process may look at the same time.
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            made = Path(place) / path.name
            error = ""
            for target in TARGETS:
                done = subprocess.run(
                    [compiler, *OPTIONS, *target, f"-DREAL={real}", str(SOURCE), "-o", str(made)],
                    capture_output=True,
                    text=True,
                    timeout=120,
                )
                if done.returncode == 0:
                    made.replace(path)
                    return path
                error = error or (done.stderr.strip().splitlines() or ["no message"])[0]
    except (OSError, subprocess.SubprocessError) as problem:
        return f"{name} failed: {problem}"
    return f"{name} failed: {error}"


def _cache() -> Path:
    """Where compiled kernels are kept: the user's cache, as for the rest of the house."""
    chosen = os.environ.get("CLLM_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "kernels"
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return (base if base.is_absolute() else home) / "cllm" / "kernels"


def _processor() -> str:
    """What machine code for this processor depends on; a home directory may be shared between machines."""
    facts = [platform.system(), platform.machine(), platform.processor()]
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(errors="replace").splitlines()
        keys = ("model name", "flags", "Features", "CPU part")
        facts += [next((line for line in lines if line.startswith(key)), "") for key in keys]
    return "\n".join(facts)
