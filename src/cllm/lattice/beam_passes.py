"""K-best as passes of torch over many targets at once, where no kernel can be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cllm.lattice.beam import Tree

BLOCK = 24
# Lines (targets × beams) worked on together: their block stays in the second-level cache.
LINES = 8192


def prepared(
    tree: Tree, K: int, children: int, keep_first: bool, out: Tensor
) -> Callable[[slice], None]:
    """What decides the targets of a slice, into ``out`` of it."""
    return lambda part: _decide(tree, part, K, children, keep_first, out)


def _decide(tree: Tree, part: slice, K: int, children: int, keep_first: bool, out: Tensor) -> None:
    """Beams of a block of rows are lines of open centres and decided coefficients; what a block decided
    reaches the other rows by one matrix product.
    """
    opened = tree.opened[part].repeat_interleave(K, dim=0)
    m, n = part.stop - part.start, opened.shape[1]
    level = _Level(tree, part, K, children, keep_first)
    slots = torch.arange(K, dtype=opened.dtype).repeat(m)[:, None]
    decided = []
    for stop in range(n, 0, -BLOCK):
        begin = max(0, stop - BLOCK)
        # Open centres, coefficients from the right, and the beam that the line began as.
        block = torch.cat([opened[:, begin:stop], slots], dim=1)
        chosen = torch.empty(m * K, stop - begin, dtype=opened.dtype)
        for i in range(stop - 1, begin - 1, -1):
            j = i - begin
            parent, x = level.decide(block[:, j].view(m, K), i)
            block, chosen = block[parent], chosen[parent]
            chosen[:, j] = x.view(-1)
            amount = level.amounts(x, i).view(-1, 1)
            block[:, :j].addmm_(amount, tree.effects[i, None, begin:i], alpha=-1)
        origin = block[:, -1].long() + level.first
        decided.append((begin, stop, chosen, origin))
        if begin:
            amounts = torch.stack(
                [level.amounts(chosen[:, j].view(m, K), begin + j) for j in range(stop - begin)], -1
            )
            opened = opened[:, :begin].index_select(0, origin)
            opened.addmm_(amounts.flatten(0, 1), tree.effects[begin:stop, :begin], alpha=-1)
    beam = level.cost.argmin(dim=1) + level.first.view(m, K)[:, 0]
    for begin, stop, chosen, origin in reversed(decided):
        out[part, begin:stop] = chosen[beam]
        beam = origin[beam]


class _Level:
    """One row of the tree for m targets with K beams each: arrays (m, K)."""

    def __init__(self, tree: Tree, part: slice, K: int, children: int, keep_first: bool) -> None:
        m = part.stop - part.start
        self.tree, self.part = tree, part
        self.K, self.children, self.keep_first = K, children, keep_first
        self.cost = torch.full((m, K), torch.inf, dtype=tree.opened.dtype)
        self.cost[:, 0] = 0
        self.first = torch.arange(0, m * K, K).repeat_interleave(K)

    def _of_targets(self, values: Tensor | None, i: int, default: float) -> Tensor | float:
        return default if values is None else values[self.part, i, None]

    def amounts(self, x: Tensor, i: int) -> Tensor:
        """v − base of coefficients (m, K) of row i."""
        tree = self.tree
        step, offset, base = (
            self._of_targets(values, i, default)
            for values, default in ((tree.step, 1.0), (tree.offset, 0.0), (tree.base, 0.0))
        )
        return offset + step * x - base

    def decide(self, centre: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Parents (lines) and coefficients (m, K) of the K best children in row i."""
        tree = self.tree
        step, offset = self._of_targets(tree.step, i, 1.0), self._of_targets(tree.offset, i, 0.0)
        real = (centre - offset) / step
        x = self._offers(real, i)
        square = tree.squares[i] * torch.as_tensor(step).square().unsqueeze(-1)
        cost = (x - real[:, None]).square_().mul_(square) + self.cost[:, None]
        if tree.low is not None and tree.high is not None:
            cost.masked_fill_((x < tree.low[i]) | (x > tree.high[i]), torch.inf)
        if tree.prices is not None:
            costs = tree.prices.costs
            size = x.abs().clamp_(max=costs.shape[1] - 1).long()
            cost += costs[tree.prices.classes[self.part, i].long()[:, None, None], size]
        if self.keep_first:
            self._first(cost, x)
        cost, x = cost.flatten(1), x.flatten(1)
        keys = cost
        if self.keep_first:
            keys = cost.clone()
            keys[:, 0] = -1
        best = torch.topk(keys, self.K, dim=1, largest=False).indices
        self.cost = cost.gather(1, best)
        return (best % self.K).view(-1) + self.first, x.gather(1, best)

    def _first(self, cost: Tensor, x: Tensor) -> None:
        """Put the cheapest child of beam 0 first."""
        best = cost[:, :, 0].argmin(dim=1, keepdim=True) if self.tree.prices else None
        if best is None:
            return
        for values in (cost, x):
            least = values[:, :, 0].gather(1, best)
            values[:, :, 0].scatter_(1, best, values[:, :1, 0].clone())
            values[:, :1, 0] = least

    def _offers(self, real: Tensor, i: int) -> Tensor:
        """(m, children, K): the nearest coefficient inside the box, then to and fro."""
        low, high = self.tree.low, self.tree.high
        near = real.round()
        if low is not None and high is not None:
            near.clamp_(low[i], high[i])
        side = torch.copysign(torch.ones_like(real), real - near)
        if low is not None and high is not None:
            beyond = near + side
            side = torch.where((beyond < low[i]) | (beyond > high[i]), -side, side)
        steps = [(c + 1) // 2 if c % 2 else -(c // 2) for c in range(1, self.children)]
        return torch.stack([near, *(near + side * to for to in steps)], dim=1)
