"""K-best decoding: nearest plane with a beam of K partial solutions."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch

from cllm.lattice.babai import Frame

# Rows a block; with the beam's origin they fill one 64-byte line of float32, which moves as one.
BLOCK = 15
# Targets worked on together, so that K beams of a block stay in the second-level cache.
CHUNK = 1024


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
    # Each row is one beam: coordinates still open, then (from the right) coefficients decided.
    beams = (targets @ fr.Q.T).repeat_interleave(K, dim=0)
    distance = torch.full((m, K), torch.inf, dtype=targets.dtype)
    distance[:, 0] = 0
    distance = distance.view(-1)
    level = _Level(fr, m, K, children, compiled)
    slots = torch.arange(K, dtype=targets.dtype).repeat(m)
    for stop in range(n, 0, -BLOCK):
        begin = max(0, stop - BLOCK)
        block = torch.cat([beams[:, begin:stop], slots[:, None]], dim=1)
        weights = _weights(fr, begin, stop)
        for i in range(stop - 1, begin - 1, -1):
            parent, x, distance = level.decide(block @ weights[i - begin], distance, i)
            block = block.index_select(0, parent)
            block[:, i - begin] = x
        origin = block[:, -1].long().add_(level.first)
        beams = beams.index_select(0, origin)
        beams[:, begin:stop] = block[:, :-1]
        if begin:
            beams[:, :begin].addmm_(block[:, :-1], fr.L[begin:stop, :begin], alpha=-1)
    best = distance.view(m, K).argmin(dim=1)
    return beams[best + torch.arange(m) * K]


def _weights(fr: Frame, begin: int, stop: int) -> torch.Tensor:
    """Row j takes a beam's line (open coordinates, decided coefficients, origin) to the centre of
    coefficient j: its coordinate less what the block's decided coefficients contribute, over r_j."""
    width = stop - begin
    square = fr.L[begin:stop, begin:stop]
    weights = fr.L.new_zeros(width, width + 1)
    weights[:, :width] = torch.eye(width, dtype=fr.L.dtype) - torch.tril(square, -1).T
    return weights / torch.diagonal(square)[:, None]


class _Level:
    """One row of the tree for m targets with K beams each, all arrays flat (m·K).

    Flat arrays make every step one contiguous pass, which is what this costs; compiled, the passes
    before and after the selection become one each.
    """

    def __init__(self, fr: Frame, m: int, K: int, children: int, compiled: bool) -> None:
        self.fr, self.m, self.K, self.children = fr, m, K, children
        self.boxed = fr.low is not None and fr.high is not None
        dtype = fr.L.dtype
        self.integer = torch.int32 if dtype == torch.float32 else torch.int64
        count = K * children
        self.mask = (1 << (count - 1).bit_length()) - 1
        self.numbers = torch.arange(count, dtype=self.integer).repeat(m).view(m, children, K)
        self.first = (torch.arange(m) * K).repeat_interleave(K)
        # Schnorr–Euchner order: to the side of the centre first, then to and fro.
        self.order = [float((c + 1) // 2 if c % 2 else -(c // 2)) for c in range(children)]
        self.steps = torch.tensor(self.order, dtype=dtype)
        self.offer, self.keep = _offer, _keep
        if compiled:
            self.offer, self.keep = _compiled()

    def decide(
        self, centre: torch.Tensor, distance: torch.Tensor, i: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Parents, coefficients of row i and squared distances of the K best children."""
        low, high = (self.fr.low, self.fr.high) if self.boxed else (None, None)
        box = None if low is None or high is None else (low[i], high[i])
        square = self.fr.L[i, i] ** 2
        keys = self.offer(centre, distance, square, box, self.numbers, self.order, self.mask)
        if self.children > 1:
            # Non-negative floats order as the integers of the same bits, so that a child's number
            # rides in the lowest bits, and a vectorised integer partition moves both at once.
            keys.numpy().partition(self.K - 1, axis=1)
        return self.keep(
            keys, centre, distance, square, box, self.first, self.steps, self.mask, self.K
        )


Box = tuple[torch.Tensor, torch.Tensor] | None


def _offer(
    centre: torch.Tensor,
    distance: torch.Tensor,
    square: torch.Tensor,
    box: Box,
    numbers: torch.Tensor,
    order: list[float],
    mask: int,
) -> torch.Tensor:
    """Keys (m, children·K) of all children: squared distance, and in the lowest bits the number."""
    m, _, K = numbers.shape
    near, side, gap = _split(centre, box)
    keys = []
    for step in order:
        off = gap - step
        cost = _bar(distance + off * off * square, near, side, step, box)
        keys.append(cost.view(numbers.dtype).view(m, K) & ~mask)
    return torch.stack(keys, dim=1).bitwise_or_(numbers).view(m, -1)


def _keep(
    keys: torch.Tensor,
    centre: torch.Tensor,
    distance: torch.Tensor,
    square: torch.Tensor,
    box: Box,
    first: torch.Tensor,
    steps: torch.Tensor,
    mask: int,
    K: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parents (as places in the flat arrays), coefficients and squared distances of the first K."""
    chosen = keys[:, :K] & mask
    if K & (K - 1):
        child, slot = chosen // K, (chosen % K).long()
    else:
        child, slot = chosen >> (K.bit_length() - 1), (chosen & (K - 1)).long()
    # With two children the step is the child's number.
    step = child.view(-1).to(steps.dtype)
    if len(steps) > 2:
        step = steps.index_select(0, child.view(-1).long())
    near, side, gap = _split(centre.view(-1, K).gather(1, slot).view(-1), box)
    off = gap - step
    cost = distance.view(-1, K).gather(1, slot).view(-1) + off * off * square
    cost = _bar(cost, near, side, step, box)
    return slot.view(-1) + first, near + side * step, cost


def _split(centre: torch.Tensor, box: Box) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nearest allowed integer, the side (±1) to step to next, and the gap on that side."""
    near = centre.round()
    if box is not None:
        near = torch.maximum(torch.minimum(near, box[1].to(near.dtype)), box[0].to(near.dtype))
    gap = centre - near
    side = torch.copysign(torch.ones((), dtype=gap.dtype), gap)
    if box is not None:
        beyond = near + side
        side = torch.where((beyond < box[0]) | (beyond > box[1]), -side, side)
        return near, side, gap * side
    return near, side, gap.abs()


def _bar(
    cost: torch.Tensor,
    near: torch.Tensor,
    side: torch.Tensor,
    step: torch.Tensor | float,
    box: Box,
) -> torch.Tensor:
    """Infinite cost to children outside the box."""
    if box is None:
        return cost
    x = near + side * step
    return cost.masked_fill((x < box[0]) | (x > box[1]), torch.inf)


@cache
def _compiled() -> tuple[Any, Any]:
    """The two passes through Inductor, tried once; the passes themselves where that fails."""
    offer, keep = (torch.compile(f, dynamic=False) for f in (_offer, _keep))
    try:
        keys = offer(*_probe(), torch.zeros(1, 2, 2, dtype=torch.int32), [0.0, 1.0], 3)
        keep(keys, *_probe(), torch.zeros(2, dtype=torch.long), torch.zeros(2), 3, 2)
    except Exception as error:
        # Whatever Inductor raises without a C++ compiler, the answer is the same without it.
        reason = str(error).splitlines()[0]
        warnings.warn(f"k-best runs uncompiled: {reason}", RuntimeWarning, stacklevel=2)
        return _offer, _keep
    return offer, keep


def _probe() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    return torch.zeros(2), torch.zeros(2), torch.ones(()), None
