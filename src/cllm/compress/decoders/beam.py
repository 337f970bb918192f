"""K-best decoding of weight rows: nearest plane with a beam of K partial rows, clipped to the grid."""

from __future__ import annotations

from torch import Tensor

from cllm.compress.decoders.lattice_frame import Points
from cllm.compress.problem import Problem
from cllm.lattice.beam import Prices, Tree, beam_search

# Bounds from here on are never reached: they are no box.
UNBOUNDED = float(2**20)


def k_best(
    problem: Problem, points: Points, K: int, *, children: int = 2, prices: Prices | None = None
) -> Tensor:
    """Codes (m, n) in the problem's order, never worse than ``babai``'s and equal to them at K = 1.

    ``lattice.beam.beam_search``, each row a tree of its own scales. Babai's own path always survives, so
    that the answer is at least as near as his. ``prices`` add to the distance what a code costs
    otherwise, its bits; then it is the path of the cheapest child that survives, and the guarantee is for
    the sum.
    """
    weight, boxed = problem.weight, points.high < UNBOUNDED
    ones = weight.new_ones(problem.shape[1])
    tree = Tree(
        opened=weight,
        effects=problem.U.T.contiguous(),
        squares=problem.squares,
        low=ones * points.low if boxed else None,
        high=ones * points.high if boxed else None,
        step=points.step.contiguous(),
        offset=points.offset,
        base=weight,
        prices=prices,
    )
    codes = beam_search(tree, K, children, keep_first=True)
    return codes.clamp_(points.low, points.high)
