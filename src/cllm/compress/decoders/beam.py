"""K-best decoding of weight rows: nearest plane with a beam of K partial rows, clipped to the grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cllm.compress.decoders.lattice_frame import Points
from cllm.compress.problem import Problem

BLOCK = 24
# Lines (rows × beams) worked on together: their block stays in the second-level cache.
LINES = 8192

Price = Callable[[int, slice, Tensor], Tensor]
"""(column, rows, codes (m, K)) to what they cost beside their distance, in the objective's unit."""


def k_best(
    problem: Problem, points: Points, K: int, *, children: int = 2, price: Price | None = None
) -> Tensor:
    """Codes (m, n) in the problem's order, never worse than ``babai``'s and equal to them at K = 1.

    The M-algorithm (Anderson & Mohan 1984), K-best in sphere decoding (Guo & Nilsson 2006): at each
    column every beam offers its ``children`` nearest codes inside the box in Schnorr–Euchner order, and
    the K of least partial distance survive. Babai's own path is beam 0 and always survives, so that the
    answer is at least as near as his. ``price`` adds to the distance what a code costs otherwise, its
    bits; then beam 0 is the path of the cheapest child, and the guarantee is for the sum.

    Beams of a block of columns are lines of open centres and decided errors; what a block decided reaches
    the other columns by one matrix product.
    """
    m, n = problem.shape
    size = max(1, LINES // K)
    codes = torch.empty(m, n, dtype=problem.weight.dtype)
    for start in range(0, m, size):
        part = slice(start, min(start + size, m))
        errors = _chunk(problem, points.rows(part), part, K, children, price)
        values = problem.weight[part] - errors
        real = (values - points.offset[part]) / points.step[part]
        codes[part] = real.round().clamp(points.low, points.high)
    return codes


def _chunk(
    problem: Problem, points: Points, part: slice, K: int, children: int, price: Price | None
) -> Tensor:
    """Errors w − ŵ (m, n) of the best beam of each row of ``part``."""
    W, U = problem.weight[part], problem.U
    m, n = W.shape
    level = _Level(problem.squares, points, part, K, children, price)
    opened = W.repeat_interleave(K, dim=0)
    slots = torch.arange(K, dtype=W.dtype).repeat(m)[:, None]
    decided = []
    for stop in range(n, 0, -BLOCK):
        begin = max(0, stop - BLOCK)
        block = torch.cat([opened[:, begin:stop], slots], dim=1)
        other = torch.empty_like(block)
        square = torch.cat(
            [torch.triu(U[begin:stop, begin:stop]), U.new_zeros(stop - begin, 1)], dim=1
        )
        for j in range(stop - 1, begin - 1, -1):
            centre = torch.mv(block, square[j - begin]).view(m, K)
            parent, values = level.decide(centre, j)
            torch.index_select(block, 0, parent, out=other)
            block, other = other, block
            block[:, j - begin] = (W[:, j, None] - values).view(-1)
        origin = block[:, -1].long() + level.first
        errors = block[:, :-1].contiguous()
        decided.append((begin, stop, errors, origin))
        if begin:
            opened = opened[:, :begin].index_select(0, origin)
            opened.addmm_(errors, U[:begin, begin:stop].T)
    out = W.new_empty(m, n)
    beam = level.distance.argmin(dim=1) + level.first.view(m, K)[:, 0]
    for begin, stop, errors, origin in reversed(decided):
        out[:, begin:stop] = errors.index_select(0, beam)
        beam = origin[beam]
    return out


class _Level:
    """One column of the tree for m rows with K beams each: arrays (m, K)."""

    def __init__(
        self,
        squares: Tensor,
        points: Points,
        part: slice,
        K: int,
        children: int,
        price: Price | None,
    ) -> None:
        m = len(points.step)
        self.squares, self.points, self.part, self.price = squares, points, part, price
        self.K, self.children = K, children
        self.boxed = points.high < 2**20
        self.distance = torch.full((m, K), torch.inf, dtype=points.step.dtype)
        self.distance[:, 0] = 0
        self.first = (torch.arange(m) * K).repeat_interleave(K)

    def decide(self, centre: Tensor, j: int) -> tuple[Tensor, Tensor]:
        """Parents (lines) and values (m, K) of column ``j`` of the K best children."""
        real = self.points.coordinates(centre, j)
        codes = self._offers(real)
        weight = self.squares[j] * self.points.step[:, j].square()
        costs = (codes - real[:, None]).square_().mul_(weight[:, None, None])
        costs += self.distance[:, None]
        # The nearest is inside; of a second one the side is chosen so that it is, if any is.
        if self.boxed:
            outside = (codes < self.points.low) | (codes > self.points.high)
            costs.masked_fill_(outside, torch.inf)
        if self.price is not None:
            flat = codes.flatten(1)
            costs += self.price(j, self.part, flat).view(costs.shape)
            # The cheapest child of beam 0 stands first.
            best = costs[:, :, 0].argmin(dim=1, keepdim=True)
            for values in (costs, codes):
                least = values[:, :, 0].gather(1, best)
                values[:, :, 0].scatter_(1, best, values[:, :1, 0])
                values[:, :1, 0] = least
        codes, costs = codes.flatten(1), costs.flatten(1)
        if self.K == 1:
            best = torch.zeros_like(self.first)[:, None]
        else:
            keys = costs.clone()
            keys[:, 0] = -1
            best = torch.topk(keys, self.K, dim=1, largest=False, sorted=True).indices
        self.distance = costs.gather(1, best)
        parent = (best % self.K).view(-1) + self.first
        return parent, self.points.values(codes.gather(1, best), j)

    def _offers(self, real: Tensor) -> Tensor:
        """(m, children, K): the nearest code inside the box, then to and fro."""
        near = real.round().clamp_(self.points.low, self.points.high)
        side = torch.where(real >= near, 1.0, -1.0).to(real.dtype)
        if self.boxed:
            beyond = near + side
            turned = (beyond < self.points.low) | (beyond > self.points.high)
            side = torch.where(turned, -side, side)
        offers = [near]
        for c in range(1, self.children):
            offers.append(near + side * ((c + 1) // 2 if c % 2 else -(c // 2)))
        return torch.stack(offers, dim=1)
