"""The kernel of the Leech lattice's decoder (leech.cpp), as a function of rows."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cllm.lattice.golay import column_patterns, hexacode
from cllm.lattice.native import Library, functions
from cllm.lattice.threads import for_each

SOURCE = Path(__file__).with_name("leech.cpp")
REALS = {torch.float32: "float", torch.float64: "double"}
SCALE = math.sqrt(8)
# Rows that a thread takes at a time, a multiple of the kernel's lanes.
CHUNK = 256

Kernel = Callable[[Tensor, Tensor], None]
"""Writes the points nearest to rows (m, 24) to rows of the second tensor."""


class _Arguments(ctypes.Structure):
    """leech.cpp's ``Arguments``."""

    _fields_ = [
        ("m", ctypes.c_int64),
        *[(name, ctypes.c_double) for name in ("scale", "unit")],
        *[(name, ctypes.c_void_p) for name in ("x", "out", "words", "patterns")],
    ]


def load(dtype: torch.dtype) -> Kernel | str:
    """The kernel for a dtype, or in one line why there is none."""
    # Vectors are passed between functions of one file only, whatever other compilers would do.
    options = ("-std=c++17", "-Wno-psabi", f"-DREAL={REALS[dtype]}")
    found = functions(Library(source=SOURCE, options=options), ("nearest",), _Arguments)
    if isinstance(found, str):
        return found
    (function,), (words, patterns) = found, _tables()

    def nearest(points: Tensor, out: Tensor) -> None:
        points = points.contiguous()
        assert points.shape == out.shape == (len(points), 24)
        assert points.dtype == out.dtype == dtype
        assert points.device.type == out.device.type == "cpu"
        assert out.is_contiguous()

        def decode(start: int) -> None:
            part = slice(start, start + CHUNK)
            arguments = _Arguments(
                m=len(points[part]),
                scale=SCALE,
                unit=1 / SCALE,
                x=points[part].data_ptr(),
                out=out[part].data_ptr(),
                words=words.ctypes.data,
                patterns=patterns.ctypes.data,
            )
            function(ctypes.byref(arguments))

        for_each(decode, range(0, len(points), CHUNK))

    return nearest


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    words, patterns = hexacode(), column_patterns()
    return words.astype(np.int32), patterns.astype(np.int32)
