"""The kernel of nearest plane and descent (columns.cpp), as functions of matrices."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cllm.compress.decoders.lattice_frame import Points
from cllm.lattice.native import Function, Library, functions
from cllm.lattice.threads import for_each

SOURCE = Path(__file__).with_name("columns.cpp")
REALS = {torch.float32: "float", torch.float64: "double"}
# Rows that a thread takes at a time, a multiple of the kernel's lanes.
CHUNK = 64


class _Arguments(ctypes.Structure):
    """columns.cpp's ``Arguments``."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("m", "n", "sweeps")],
        *[(name, ctypes.c_void_p) for name in ("weight", "matrix", "step", "offset")],
        *[(name, ctypes.c_double) for name in ("low", "high")],
        ("codes", ctypes.c_void_p),
    ]


class Kernel:
    """The compiled functions for one dtype. All matrices are (m, n) but ``matrix`` (n, n)."""

    def __init__(self, found: tuple[Function, ...], dtype: torch.dtype) -> None:
        (self._nearest, self._descend), self.dtype = found, dtype

    def nearest(self, weight: Tensor, U: Tensor, points: Points) -> Tensor:
        """Codes by nearest plane, columns from the last to the first (see ``babai``)."""
        codes = torch.empty_like(weight, memory_format=torch.contiguous_format)
        self._each(self._nearest, weight, U, points, codes, 0)
        return codes

    def descend(
        self, weight: Tensor, H: Tensor, points: Points, codes: Tensor, sweeps: int
    ) -> Tensor:
        """``codes`` after ``sweeps`` sweeps (see ``cllm.compress.decoders.descent.descend``)."""
        codes = codes.to(self.dtype).clone(memory_format=torch.contiguous_format)
        self._each(self._descend, weight, H, points, codes, sweeps)
        return codes

    def _each(
        self,
        function: Callable[..., None],
        weight: Tensor,
        matrix: Tensor,
        points: Points,
        codes: Tensor,
        sweeps: int,
    ) -> None:
        m, n = weight.shape
        matrix = matrix.contiguous()
        given = {"weight": weight, "step": points.step, "offset": points.offset}
        rows = {name: tensor.to(self.dtype).contiguous() for name, tensor in given.items()}
        rows["codes"] = codes
        assert matrix.shape == (n, n)
        assert all(t.shape == (m, n) for t in rows.values())
        assert all(t.dtype == self.dtype for t in (matrix, *rows.values()))

        def decide(start: int) -> None:
            part = slice(start, min(start + CHUNK, m))
            arguments = _Arguments(
                m=part.stop - start,
                n=n,
                sweeps=sweeps,
                matrix=matrix.data_ptr(),
                low=points.low,
                high=points.high,
                **{name: tensor[part].data_ptr() for name, tensor in rows.items()},
            )
            function(ctypes.byref(arguments))

        for_each(decide, range(0, m, CHUNK))


def load(dtype: torch.dtype) -> Kernel | str:
    """The kernel for a dtype, or in one line why there is none."""
    library = Library(source=SOURCE, options=("-std=c++17", f"-DREAL={REALS[dtype]}"))
    found = functions(library, ("nearest", "descend"), _Arguments)
    return found if isinstance(found, str) else Kernel(found, dtype)


def kernel_or_none(dtype: torch.dtype) -> Kernel | None:
    """The kernel, or none where it cannot be compiled, which a warning says once."""
    found = load(dtype)
    if not isinstance(found, str):
        return found
    # Python shows a warning of one place and text once.
    warnings.warn(
        f"columns are decided by passes of torch, several times slower: {found}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None
