"""K-best decoding onto blocks of E8 and Leech points: a beam that keeps what residues each path allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cllm.compress.lattices.blocks import Kind, Link, chain, parities, runs, units
from cllm.compress.problem import Problem
from cllm.lattice.threads import for_each

# Columns worked on together; their errors reach the others by one matrix product.
SPAN = 24
# Lines (rows × beams) worked on together: their block stays in the second-level cache.
LINES = 8192

Price = Callable[[int, slice, Tensor], Tensor]
"""(column, rows, integers (m, K)) to what they cost beside their distance, in the objective's unit."""


def k_best_blocks(
    problem: Problem,
    lattice: str,
    steps: Tensor,
    K: int,
    *,
    children: int = 2,
    price: Price | None = None,
) -> Tensor:
    """Integers (m, n), columns in the original order, that are points of ``lattice`` block by block.

    ``steps`` (n,): the length of a unit of volume in the weights, original order. The M-algorithm as in
    ``k_best``: at each column every beam offers its ``children`` nearest integers of the residue class that
    its own path allows (at a block's first column, where the parity is open, twice as many), and the K of
    least distance and ``price`` survive. ``price`` gets original columns. Blocks must lie together in the
    problem's order (``problem(blocks=…)``).
    """
    m, n = problem.shape
    columns = _columns(problem, lattice)
    real = (steps.double() * torch.from_numpy(units(lattice, n)))[problem.order]
    work = _Work(problem, columns, real.to(problem.weight.dtype), K, children, price)
    size = max(1, LINES // K)
    out = torch.empty(m, n, dtype=problem.weight.dtype)

    def decide(start: int) -> None:
        part = slice(start, min(start + size, m))
        errors = _chunk(work, part)
        out[part] = ((problem.weight[part] - errors) / work.steps).round()

    for_each(decide, range(0, m, size))
    return problem.back(out)


@dataclass(frozen=True)
class _Column:
    """A place in the problem's order: its block's kind, its link, and whether it opens the block."""

    kind: Kind
    link: Link
    first: bool
    column: int


@dataclass(frozen=True, eq=False)
class _Work:
    problem: Problem
    columns: list[_Column]
    steps: Tensor
    K: int
    children: int
    price: Price | None


def _columns(problem: Problem, lattice: str) -> list[_Column]:
    n = problem.shape[1]
    place = torch.empty_like(problem.order)
    place[problem.order] = torch.arange(n)
    found: list[_Column | None] = [None] * n
    for run in runs(lattice, n):
        for start in range(run.start, run.stop, run.kind.width):
            mine = place[start : start + run.kind.width]
            taken = torch.argsort(mine, descending=True)
            for i, link in enumerate(chain(run.kind, tuple(taken.tolist()))):
                column = start + link.position
                found[int(place[column])] = _Column(run.kind, link, i == 0, column)
    return [column for column in found if column is not None]


def _spans(columns: list[_Column]) -> list[tuple[int, int]]:
    """(begin, stop) of whole blocks, about ``SPAN`` columns together, from the last to the first."""
    spans, stop = [], len(columns)
    while stop:
        begin = stop
        while begin and stop - begin + (width := columns[begin - 1].kind.width) <= SPAN:
            begin -= width
        spans.append((begin, stop))
        stop = begin
    return spans


def _chunk(work: _Work, part: slice) -> Tensor:
    """Errors w − ŵ (m, n) in the problem's order of the best beam of each row of ``part``."""
    W, U, K = work.problem.weight[part], work.problem.U, work.K
    m, n = W.shape
    opened = W.repeat_interleave(K, dim=0)
    slots = torch.arange(K, dtype=W.dtype).repeat(m)[:, None]
    distance = torch.full((m, K), torch.inf, dtype=W.dtype)
    distance[:, 0] = 0
    first = (torch.arange(m) * K).repeat_interleave(K)
    decided = []
    for begin, stop in _spans(work.columns):
        width = stop - begin
        # A line: open centres and decided errors, then its slot, then the state of its block.
        lines = torch.cat([opened[:, begin:stop], slots, slots.new_zeros(len(slots), 3)], dim=1)
        square = torch.cat([torch.triu(U[begin:stop, begin:stop]), U.new_zeros(width, 4)], dim=1)
        for j in range(stop - 1, begin - 1, -1):
            column = work.columns[j]
            centre = torch.mv(lines, square[j - begin])
            residue = _residue(column, lines[:, width + 1 :])
            found = _decide(work, part, j, (centre.view(m, K), residue.view(m, K)), distance)
            distance, picked, integers = found
            parent = (picked % K).view(-1) + first
            lines = lines.index_select(0, parent)
            integers = integers.view(-1)
            wide = W[:, j].repeat_interleave(K)
            lines[:, j - begin] = wide - integers * work.steps[j]
            _advance(column, integers, lines[:, width + 1 :])
        origin = lines[:, width].long() + first
        errors = lines[:, :width].contiguous()
        decided.append((begin, stop, errors, origin))
        if begin:
            opened = opened[:, :begin].index_select(0, origin)
            opened.addmm_(errors, U[:begin, begin:stop].T)
    out = W.new_empty(m, n)
    beam = distance.argmin(dim=1) + first.view(m, K)[:, 0]
    for begin, stop, errors, origin in reversed(decided):
        out[:, begin:stop] = errors.index_select(0, beam)
        beam = origin[beam]
    return out


def _decide(
    work: _Work, part: slice, j: int, lines: tuple[Tensor, Tensor], distance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of centres and residues (m, K): distances (m, K) of the K best children, which they are, and their
    integers."""
    column, (centre, residue) = work.columns[j], lines
    spacing = 1 if column.first else column.link.spacing
    real = centre / work.steps[j]
    near = ((real - residue) / spacing).round_().mul_(spacing).add_(residue)
    side = torch.where(real >= near, spacing, -spacing).to(real.dtype)
    offers = [near]
    for c in range(1, work.children * (2 if column.first and column.kind.width > 1 else 1)):
        offers.append(near + side * ((c + 1) // 2 if c % 2 else -(c // 2)))
    integers = torch.stack(offers, dim=1)
    weight = float(work.problem.squares[j]) * float(work.steps[j]) ** 2
    costs = (integers - real[:, None]).square_().mul_(weight).add_(distance[:, None])
    integers, costs = integers.flatten(1), costs.flatten(1)
    if work.price is not None:
        costs += work.price(column.column, part, integers)
    best = torch.topk(costs, work.K, dim=1, largest=False, sorted=False)
    return best.values, best.indices, integers.gather(1, best.indices)


_PARITIES = torch.from_numpy(parities().astype(np.float32))


def _residue(column: _Column, state: Tensor) -> Tensor:
    """(lines,) what each line's integer is modulo the link's spacing. ``state`` (lines, 3): the block's
    parity m, the sum of its integers, and the information bits of its Golay word."""
    kind, link = column.kind, column.link
    m, total, word = state.unbind(dim=1)
    if column.first or kind.width == 1:
        return torch.zeros_like(m)
    if link.spacing == kind.modulus:
        return torch.remainder((4 * m if kind.width == 24 else 0) - total, kind.modulus)
    if link.spacing == 4:
        return m + 2 * _PARITIES.to(m.dtype)[word.long() & link.mask]
    return m


def _advance(column: _Column, integers: Tensor, state: Tensor) -> None:
    """Take a block's next integers into ``state``; the block's first ones begin it anew."""
    if column.first:
        state[:, 0] = torch.remainder(integers, 2)
        state[:, 1:] = 0
    state[:, 1] = torch.remainder(state[:, 1] + integers, 8)
    if column.link.bit >= 0:
        bit = torch.remainder((integers - state[:, 0]) / 2, 2)
        state[:, 2] += bit * (1 << column.link.bit)
