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
# Targets worked on together: a row of K beams stays in the second-level cache.
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
    # Beam k of target t is line t·K + k, so that a target's beams are gathered from one place.
    opened = (targets @ fr.Q.T).repeat_interleave(K, dim=0)
    slots = torch.arange(K, dtype=targets.dtype).repeat(m)
    centre = targets.new_empty(m * K)
    decided = []
    for stop in range(n, 0, -BLOCK):
        begin = max(0, stop - BLOCK)
        # A line: the block's coordinates still open, then (from the right) coefficients decided, and
        # last the beam that it began as.
        block = torch.cat([opened[:, begin:stop], slots[:, None]], dim=1)
        other = torch.empty_like(block)
        weights = _weights(fr, begin, stop)
        for i in range(stop - 1, begin - 1, -1):
            torch.mv(block, weights[i - begin], out=centre)
            parent, x = level.decide(centre.numpy(), i)
            # Of whole lines NumPy's gather is faster than torch's.
            np.take(block.numpy(), parent, axis=0, out=other.numpy(), mode="clip")
            block, other = other, block
            block.numpy()[:, i - begin] = x
        origin = block[:, -1].long().add_(level.first)
        decided.append((begin, stop, block, origin))
        if begin:
            opened = opened[:, :begin].index_select(0, origin)
            opened.addmm_(block[:, :-1], fr.L[begin:stop, :begin], alpha=-1)
    out = targets.new_empty(m, n)
    best = torch.from_numpy(level.distance).view(m, K).argmin(dim=1)
    beam = best.add_(level.first[::K])
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
    """One row of the tree for m targets with K beams each, in arrays (m·K,) and (children, m·K).

    NumPy, since its passes start sooner than torch's.
    """

    def __init__(self, fr: Frame, m: int, K: int, children: int, compiled: bool) -> None:
        dtype = torch.empty(0, dtype=fr.L.dtype).numpy().dtype
        size = m * K
        self.m, self.K, self.children = m, K, children
        self.squares = (torch.diagonal(fr.L) ** 2).numpy()
        self.box = None
        if fr.low is not None and fr.high is not None:
            self.box = fr.low.numpy().astype(dtype), fr.high.numpy().astype(dtype)
        self.first = torch.arange(0, size, K).repeat_interleave(K)
        self.distance = np.full(size, np.inf, dtype=dtype)
        self.distance[::K] = 0
        # Schnorr–Euchner order: to the side of the centre first, then to and fro.
        self.steps = [dtype.type((c + 1) // 2 if c % 2 else -(c // 2)) for c in range(children)]
        self.offers = _compiled() if compiled else None
        self.integer = np.dtype(f"i{dtype.itemsize}")
        self.one = dtype.type(1).view(self.integer)
        self.sign = np.iinfo(self.integer).min
        count = K * children
        self.mask = self.integer.type((1 << (count - 1).bit_length()) - 1)
        # Child c of beam k of a target is number c·K + k.
        numbers = np.arange(count, dtype=self.integer).reshape(children, 1, K)
        self.numbers = np.repeat(numbers, m, axis=1).reshape(children, size)
        self.gap, self.side, self.x = np.empty((3, size), dtype=dtype)
        self.costs, self.choices = np.empty((2, children, size), dtype=dtype)
        self.keys = np.empty((m, children, K), dtype=self.integer)
        self.best, self.narrow = np.empty((2, m, K), dtype=self.integer)
        self.narrow_first = self.first.numpy().astype(self.integer).reshape(m, K)
        self.child, self.parent = np.empty((2, size), dtype=np.int64)

    def decide(self, centre: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Parents (lines of the block) and coefficients (m·K,) of row i of the K best children."""
        if self.offers is not None:
            self._offer_compiled(self.offers, centre, i)
        else:
            self._offer(centre, i)
        self._choose()
        np.take(self.costs.reshape(-1), self.child, out=self.distance, mode="clip")
        np.take(self.choices.reshape(-1), self.child, out=self.x, mode="clip")
        return self.parent, self.x

    def _offer(self, centre: np.ndarray, i: int) -> None:
        """Costs and coefficients of all children."""
        near, gap, side, square = self.choices[0], self.gap, self.side, self.squares[i]
        np.rint(centre, out=near)
        if self.box is not None:
            np.clip(near, self.box[0][i], self.box[1][i], out=near)
        np.subtract(centre, near, out=gap)
        # ±1 by the sign bit alone.
        bits = side.view(self.integer)
        np.bitwise_and(gap.view(self.integer), self.sign, out=bits)
        np.bitwise_or(bits, self.one, out=bits)
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
        self._number()

    def _number(self) -> None:
        # In place where the next pass needs it: targets apart, since they are sorted apart.
        for c, cost in enumerate(self.costs):
            key = self.gap.view(self.integer)
            np.bitwise_and(cost.view(self.integer), ~self.mask, out=key)
            np.bitwise_or(key, self.numbers[c], out=key)
            np.copyto(self.keys[:, c], key.reshape(self.m, self.K))

    def _offer_compiled(self, offers: Any, centre: np.ndarray, i: int) -> None:
        box = None
        if self.box is not None:
            box = torch.from_numpy(self.box[0])[i], torch.from_numpy(self.box[1])[i]
        distance, numbers = torch.from_numpy(self.distance), torch.from_numpy(self.numbers)
        square, steps = torch.from_numpy(self.squares)[i], [float(step) for step in self.steps]
        found = offers(
            torch.from_numpy(centre), distance, square, box, numbers, steps, int(self.mask)
        )
        self.costs, self.choices = found[0].numpy(), found[1].numpy()
        for c, key in enumerate(found[2].numpy()):
            np.copyto(self.keys[:, c], key.reshape(self.m, self.K))

    def _choose(self) -> None:
        """Places of the best children, and of their beams.

        Non-negative floats order as the integers of the same bits, so that a child's number rides in
        the lowest bits, and sorting integers moves both at once.
        """
        keys = self.keys.reshape(self.m, -1)
        if self.children > 1:
            # Small sorts are a network in registers, and as fast as a partition.
            keys.sort(axis=1)
        best, narrow = self.best, self.narrow
        np.bitwise_and(keys[:, : self.K], self.mask, out=best)
        np.floor_divide(best, self.K, out=narrow)
        np.multiply(narrow, self.K, out=narrow)
        np.subtract(best, narrow, out=best)
        np.add(best, self.narrow_first, out=best)
        np.copyto(self.parent.reshape(best.shape), best)
        # Child c of line j is at c·(m·K) + j.
        np.multiply(narrow, self.m, out=narrow)
        np.add(narrow, best, out=best)
        np.copyto(self.child.reshape(best.shape), best)


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
