"""The kernel of K-best (beam.cpp), as a function of a tree."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cllm.lattice.native import Library, functions

if TYPE_CHECKING:
    from cllm.lattice.beam import Tree

SOURCE = Path(__file__).with_name("beam.cpp")
# Rows of ``effects`` and of beams are padded to whole products.
STRIP = 16
REALS = {torch.float32: "float", torch.float64: "double"}
# Costs are ordered by their bits.
OPTIONS = ("-std=c++17", "-fno-strict-aliasing")

Prepared = Callable[[slice], None]
"""Decides the targets of a slice."""
Kernel = Callable[["Tree", int, int, bool, Tensor], Prepared]
"""From a tree, K, children, whether the first path is kept, and the coefficients to write."""


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


def load(dtype: torch.dtype) -> Kernel | str:
    """The kernel for a dtype, or in one line why there is none."""
    library = Library(source=SOURCE, options=(*OPTIONS, f"-DREAL={REALS[dtype]}"))
    found = functions(library, ("beam",), _Arguments)
    if isinstance(found, str):
        return found
    (kernel,) = found

    def prepared(tree: Tree, K: int, children: int, keep_first: bool, out: Tensor) -> Prepared:
        n = tree.opened.shape[1]
        effects = tree.effects.new_zeros(n, -(-n // STRIP) * STRIP)
        effects[:, :n] = tree.effects
        classes, costs = None, None
        if tree.prices is not None:
            classes, costs = tree.prices.classes, tree.prices.costs
        shared = {
            "effects": effects,
            "squares": tree.squares,
            "low": tree.low,
            "high": tree.high,
            "costs": costs,
        }
        rows = {
            "opened": tree.opened,
            "step": tree.step,
            "offset": tree.offset,
            "base": tree.base,
            "classes": classes,
            "out": out,
        }
        for name, tensor in (shared | rows).items():
            wanted = torch.uint8 if name == "classes" else dtype
            assert tensor is None or (tensor.is_contiguous() and tensor.dtype == wanted), name

        def decide(part: slice) -> None:
            mine = {name: None if t is None else t[part] for name, t in rows.items()}
            arguments = _Arguments(
                m=part.stop - part.start,
                n=n,
                stride=effects.shape[1],
                K=K,
                children=children,
                keep_first=keep_first,
                magnitudes=0 if costs is None else costs.shape[1],
                **{k: None if t is None else t.data_ptr() for k, t in (shared | mine).items()},
            )
            kernel(ctypes.byref(arguments))

        return decide

    return prepared
