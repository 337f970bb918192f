"""K-best decoding: nearest plane with a beam of K partial solutions."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import torch

from cllm.lattice.babai import Frame

# Rows a block; with the beam's origin they fill one 64-byte line of float32, which moves as one.
BLOCK = 15
# Targets worked on together: a row of K beams stays in the second-level cache. No power of two, so that
# the K lines of a target do not all fall into one set of a cache.
CHUNK = 1040


def k_best(
    fr: Frame, targets: torch.Tensor, K: int, children: int, compiled: bool = False
) -> torch.Tensor:
    """Beam search over the nearest-plane tree: coefficients (m, n).

    The M-algorithm of sequential decoding (Anderson & Mohan, IEEE Trans. Communications 32, 1984),
    known as K-best in sphere decoding (Guo & Nilsson, IEEE J. Sel. Areas Commun. 24, 2006): at each
    row every beam offers its ``children`` nearest integers in Schnorr–Euchner order, and the K
    partial distances that are smallest survive. Which of two nearly equal partial distances survives
    is decided at a precision reduced by log2(K·children) bits; the distances that are kept are whole.

    A beam can lose Babai's own path: ``closest`` compares the two and returns the better.
    """
    out = torch.empty(len(targets), len(fr.L), dtype=targets.dtype)
    for start in range(0, len(targets), CHUNK):
        part = targets[start : start + CHUNK]
        # Code is compiled for full chunks; what remains would compile once more.
        whole = compiled and len(part) == CHUNK
        out[start : start + CHUNK] = _chunk(fr, part, K, children, whole)
    return out


def _chunk(fr: Frame, targets: torch.Tensor, K: int, children: int, compiled: bool) -> torch.Tensor:
    m, n = len(targets), len(fr.L)
    level = _Level(fr, m, K, children, compiled)
    # Beam k of target t is line k·m + t: targets lie along the contiguous dimension of (K, m).
    opened = (targets @ fr.Q.T).repeat(K, 1)
    slots = torch.arange(K, dtype=targets.dtype).repeat_interleave(m)
    decided = []
    for stop in range(n, 0, -BLOCK):
        begin = max(0, stop - BLOCK)
        # A line: the block's coordinates still open, then (from the right) coefficients decided, and
        # last the beam that it began as.
        block = torch.cat([opened[:, begin:stop], slots[:, None]], dim=1)
        other = torch.empty_like(block)
        weights = _weights(fr, begin, stop)
        for i in range(stop - 1, begin - 1, -1):
            parent, x = level.decide(torch.mv(block, weights[i - begin]).view(K, m), i)
            block, other = torch.index_select(block, 0, parent, out=other), block
            block[:, i - begin] = x
        origin = block[:, -1].long().mul_(m).add_(level.target)
        decided.append((begin, stop, block, origin))
        if begin:
            opened = opened[:, :begin].index_select(0, origin)
            opened.addmm_(block[:, :-1], fr.L[begin:stop, :begin], alpha=-1)
    out = targets.new_empty(m, n)
    beam = torch.from_numpy(level.distance).argmin(dim=0).mul_(m).add_(level.target[:m])
    for begin, stop, block, origin in reversed(decided):
        out[:, begin:stop] = block[:, :-1].index_select(0, beam)
        beam = origin[beam]
    return out


def _weights(fr: Frame, begin: int, stop: int) -> torch.Tensor:
    """Row j takes a beam's line (open coordinates, decided coefficients, origin) to the centre of
    coefficient j: its coordinate less what the block's decided coefficients contribute, over r_j."""
    width = stop - begin
    square = fr.L[begin:stop, begin:stop]
    weights = fr.L.new_zeros(width, width + 1)
    weights[:, :width] = torch.eye(width, dtype=fr.L.dtype) - torch.tril(square, -1).T
    return weights / torch.diagonal(square)[:, None]


class _Level:
    """One row of the tree for m targets with K beams each, in arrays (K, m) and (children, K, m).

    NumPy, since its passes start sooner than torch's.
    """

    def __init__(self, fr: Frame, m: int, K: int, children: int, compiled: bool) -> None:
        dtype = torch.empty(0, dtype=fr.L.dtype).numpy().dtype
        self.m, self.K, self.children = m, K, children
        self.squares = (torch.diagonal(fr.L) ** 2).numpy()
        self.box = None
        if fr.low is not None and fr.high is not None:
            self.box = fr.low.numpy().astype(dtype), fr.high.numpy().astype(dtype)
        self.target = torch.arange(m).repeat(K)
        self.distance = np.full((K, m), np.inf, dtype=dtype)
        self.distance[0] = 0
        # Schnorr–Euchner order: to the side of the centre first, then to and fro.
        self.steps = [dtype.type((c + 1) // 2 if c % 2 else -(c // 2)) for c in range(children)]
        self.offers = _compiled() if compiled else None
        self.integer = np.dtype(f"i{dtype.itemsize}")
        self.one = dtype.type(1).view(self.integer)
        count = K * children
        self.mask = (1 << (count - 1).bit_length()) - 1
        numbers = np.arange(count, dtype=self.integer).reshape(children, K, 1)
        self.numbers = np.repeat(numbers, m, axis=2)
        self.gap, self.side, self.x = np.empty((3, K, m), dtype=dtype)
        self.costs, self.choices = np.empty((2, children, K, m), dtype=dtype)
        self.keys, self.spare = np.empty((2, children, K, m), dtype=self.integer)
        # Other numbers are left to a partition, which is slower.
        paired = children == 2 and not K & (K - 1)
        self.sort = SortRows(self.keys, self.spare) if paired else None
        self.child, self.parent = np.empty((2, K, m), dtype=np.int64)
        self.narrow = np.empty((K, m), dtype=self.integer)
        self.places = np.arange(m, dtype=self.integer)

    def decide(self, centre: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Parents (lines of the block) and coefficients of row i of the K best children, flat."""
        if self.offers is not None:
            self._offer_compiled(self.offers, centre, i)
        else:
            self._offer(centre.numpy(), i)
        self._choose()
        np.take(self.costs, self.child, out=self.distance, mode="clip")
        np.take(self.choices, self.child, out=self.x, mode="clip")
        return torch.from_numpy(self.parent).view(-1), torch.from_numpy(self.x).view(-1)

    def _offer(self, centre: np.ndarray, i: int) -> None:
        """Costs and coefficients of all children."""
        near, gap, side, square = self.choices[0], self.gap, self.side, self.squares[i]
        np.rint(centre, out=near)
        if self.box is not None:
            np.clip(near, self.box[0][i], self.box[1][i], out=near)
        np.subtract(centre, near, out=gap)
        # ±1 by the sign bit alone.
        np.bitwise_and(
            gap.view(self.integer), np.iinfo(self.integer).min, out=side.view(self.integer)
        )
        np.bitwise_or(side.view(self.integer), self.one, out=side.view(self.integer))
        if self.box is not None:
            beyond = near + side
            side[(beyond < self.box[0][i]) | (beyond > self.box[1][i])] *= -1
        np.multiply(gap, side, out=gap)
        for step, cost, x in zip(self.steps, self.costs, self.choices, strict=True):
            off = np.subtract(gap, step, out=cost) if step else gap
            np.multiply(off, off, out=cost)
            np.multiply(cost, square, out=cost)
            np.add(cost, self.distance, out=cost)
            if not step:
                # The nearest itself: it is there already, and inside the box.
                continue
            np.add(near, side if step == 1 else side * step, out=x)
            if self.box is not None:
                cost[(x < self.box[0][i]) | (x > self.box[1][i])] = np.inf

        np.bitwise_and(self.costs.view(self.integer), ~self.mask, out=self.keys)
        np.bitwise_or(self.keys, self.numbers, out=self.keys)

    def _offer_compiled(self, offers: Any, centre: torch.Tensor, i: int) -> None:
        box = None
        if self.box is not None:
            box = torch.from_numpy(self.box[0])[i], torch.from_numpy(self.box[1])[i]
        distance, numbers = torch.from_numpy(self.distance), torch.from_numpy(self.numbers)
        square, steps = torch.from_numpy(self.squares)[i], [float(step) for step in self.steps]
        found = offers(centre, distance, square, box, numbers, steps, self.mask)
        self.costs, self.choices = found[0].numpy(), found[1].numpy()
        np.copyto(self.keys, found[2].numpy())

    def _choose(self) -> None:
        """Places of the best children, and of their beams (K, m).

        Non-negative floats order as the integers of the same bits, so that a child's number rides in
        the lowest bits, and minima and maxima of integers move both at once.
        """
        if self.children == 1:
            self._place(self.numbers[0], self.child)
            self._place(self.numbers[0], self.parent)
            return
        if self.sort is not None:
            keys, spare = self.sort()
            # Of two sorted lists, the K least of both: the i-th of one against the i-th last.
            best = np.minimum(keys[0], keys[1, ::-1], out=spare[0])
        else:
            flat = self.keys.reshape(-1, self.m)
            best = np.partition(flat, self.K - 1, axis=0)[: self.K]
        np.bitwise_and(best, self.mask, out=best)
        self._place(best, self.child)
        if self.K & (self.K - 1):
            np.remainder(best, self.K, out=best)
        else:
            np.bitwise_and(best, self.K - 1, out=best)
        self._place(best, self.parent)

    def _place(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Places in a flat (..., m) of rows given by number (K, m), computed in the narrow type."""
        np.multiply(numbers, self.m, out=self.narrow)
        np.add(self.narrow, self.places, out=self.narrow)
        np.copyto(out, self.narrow)


class SortRows:
    """Sorts (lists, K, m) along K, a power of two, by a bitonic network (Batcher, "Sorting networks and
    their applications", AFIPS 1968): passes of minima and maxima over whole rows.

    The passes go to and fro between the two arrays given, and their views are made once.
    """

    def __init__(self, keys: np.ndarray, spare: np.ndarray) -> None:
        K = keys.shape[1]
        self._passes: list[tuple[np.ndarray, ...]] = []
        size = 2
        while size <= K:
            # Two sorted halves, the second read backwards, make a bitonic list.
            (a, b), (low, high) = _halves(keys, size // 2), _halves(spare, size // 2)
            self._passes.append((a, b[:, ::-1], low, high[:, ::-1]))
            keys, spare = spare, keys
            half = size // 4
            while half:
                self._passes.append((*_halves(keys, half), *_halves(spare, half)))
                keys, spare = spare, keys
                half //= 2
            size *= 2
        self._ends = keys, spare

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        """The sorted array and the one to spare."""
        for a, b, low, high in self._passes:
            np.minimum(a, b, out=low)
            np.maximum(a, b, out=high)
        return self._ends


def _halves(rows: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """First and second half of every 2·half rows, each (groups, half, m)."""
    pairs = rows.reshape(-1, 2, half, rows.shape[-1])
    return pairs[:, 0], pairs[:, 1]


Box = tuple[torch.Tensor, torch.Tensor] | None


def _offers(
    centre: torch.Tensor,
    distance: torch.Tensor,
    square: torch.Tensor,
    box: Box,
    numbers: torch.Tensor,
    steps: list[float],
    mask: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``_Level._offer`` fills in: costs, coefficients and keys (children, K, m), as one function
    for Inductor to make one pass of."""
    near = centre.round()
    if box is not None:
        near = torch.maximum(torch.minimum(near, box[1]), box[0])
    gap = centre - near
    side = torch.copysign(torch.ones((), dtype=gap.dtype), gap)
    if box is not None:
        beyond = near + side
        side = torch.where((beyond < box[0]) | (beyond > box[1]), -side, side)
    gap = gap * side
    costs, choices = [], []
    for step in steps:
        off, x = gap - step, near + side * step
        cost = off * off * square + distance
        if box is not None:
            cost = cost.masked_fill((x < box[0]) | (x > box[1]), torch.inf)
        costs.append(cost)
        choices.append(x)
    cost = torch.stack(costs)
    return cost, torch.stack(choices), (cost.view(numbers.dtype) & ~mask) | numbers


@cache
def _compiled() -> Any:
    """``_offers`` through Inductor, tried once; None where that fails."""
    offers = torch.compile(_offers, dynamic=False)
    try:
        numbers = torch.zeros(2, 1, 2, dtype=torch.int32)
        offers(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(()), None, numbers, [0.0, 1.0], 1)
    except Exception as error:
        # Whatever Inductor raises without a C++ compiler, the answer is the same without it.
        reason = str(error).splitlines()[0]
        warnings.warn(f"k-best runs uncompiled: {reason}", RuntimeWarning, stacklevel=2)
        return None
    return offers
