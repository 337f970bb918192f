"""K-best: nearest plane with a beam of K partial solutions, for any number of targets over one factor."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.lattice import beam_kernel, beam_passes
from cllm.lattice.check import empty
from cllm.lattice.threads import for_each

# Targets that a thread takes at a time.
CHUNK = 256


@dataclass(frozen=True, eq=False)
class Prices:
    """What coefficients cost beside their distance: ``costs[classes[t, i], min(|x|, last)]``.

    Attributes:
        classes: (m, n) uint8.
        costs: (classes, magnitudes), non-negative, in the unit of squared distances.
    """

    classes: Tensor
    costs: Tensor


@dataclass(frozen=True, eq=False)
class Tree:
    """The nearest-plane trees of m targets, decided from the last of n rows to the first.

    Row i of a target stands at ``opened[:, i]`` before anything is decided. A coefficient x there has the
    value v = offset + step·x and costs ``squares[i]``·(v − centre)²; it moves the centres of the rows
    before it by −(v − base)·``effects[i]``. All are contiguous and of one dtype, float32 or float64.

    Attributes:
        opened: (m, n).
        effects: (n, n), of which the strictly lower triangle counts.
        squares: (n,).
        low, high: (n,) whole numbers that the coefficients keep to, or None.
        step, offset: (m, n), or None for 1 and 0. No step is 0.
        base: (m, n), or None for 0.
        prices: of coefficients, or None.
    """

    opened: Tensor
    effects: Tensor
    squares: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    step: Tensor | None = None
    offset: Tensor | None = None
    base: Tensor | None = None
    prices: Prices | None = None


def beam_search(
    tree: Tree, K: int, children: int = 2, *, keep_first: bool = False, kernel: bool | None = None
) -> Tensor:
    """Coefficients (m, n), whole numbers in the tree's dtype, of the best of K beams.

    The M-algorithm of sequential decoding (Anderson & Mohan, IEEE Trans. Communications 32, 1984), known
    as K-best in sphere decoding (Guo & Nilsson, IEEE J. Sel. Areas Commun. 24, 2006): at each row every
    beam offers its ``children`` nearest coefficients in Schnorr–Euchner order, inside the box where there
    is one, and the K of least cost survive.

    ``keep_first``: the path of nearest coefficients (with prices, of the cheapest children), Babai's,
    always survives; without, a beam can lose it. ``kernel``: decide by the compiled kernel (True: raises
    ``ValueError`` where none can be compiled), by torch's passes (False), or by the kernel where there is
    a C++ compiler and else by passes, with a warning once (None). Both search alike; sums may be rounded
    differently. Chunks of targets are shared out among torch's number of threads.
    """
    _check(tree)
    m, n = tree.opened.shape
    prepared: beam_kernel.Kernel = beam_passes.prepared
    size = max(1, beam_passes.LINES // K)
    if kernel or kernel is None:
        found = beam_kernel.load(tree.opened.dtype)
        if not isinstance(found, str):
            # Few targets, too, are shared out.
            prepared, size = found, max(1, min(CHUNK, -(-m // torch.get_num_threads())))
        elif kernel:
            raise ValueError(f"the kernel for K-best cannot be compiled: {found}")
        else:
            _say_once(found)
    out = empty((m, n), tree.opened.dtype)

    decide = prepared(tree, K, children, keep_first, out)
    for_each(lambda start: decide(slice(start, min(start + size, m))), range(0, m, size))
    return out


def _check(tree: Tree) -> None:
    """The kernel trusts shapes and classes; whoever makes a tree answers for them."""
    m, n = tree.opened.shape
    assert tree.effects.shape == (n, n)
    assert tree.squares.shape == (n,)
    assert all(bound is None or bound.shape == (n,) for bound in (tree.low, tree.high))
    assert all(t is None or t.shape == (m, n) for t in (tree.step, tree.offset, tree.base))
    if tree.prices is not None and m:
        assert tree.prices.classes.shape == (m, n)
        assert int(tree.prices.classes.max()) < len(tree.prices.costs)


def _say_once(reason: str) -> None:
    # Python shows a warning of one place and text once.
    warnings.warn(
        f"k-best runs as passes of torch, several times slower: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
