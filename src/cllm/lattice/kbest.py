"""K-best decoding: nearest plane with a beam of K partial solutions."""

from __future__ import annotations

import torch

from cllm.lattice.babai import Frame

# Rows a block; with the beam's origin they fill one 64-byte line of float32, which moves as one.
BLOCK = 15
# Targets worked on together, so that K beams of a block stay in the second-level cache.
CHUNK = 1024


def k_best(fr: Frame, targets: torch.Tensor, K: int, children: int) -> torch.Tensor:
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
        out[start : start + CHUNK] = _chunk(fr, part, K, children)
    return out


def _chunk(fr: Frame, targets: torch.Tensor, K: int, children: int) -> torch.Tensor:
    m, n = len(targets), len(fr.L)
    # Each row is one beam: coordinates still open, then (from the right) coefficients decided.
    beams = (targets @ fr.Q.T).repeat_interleave(K, dim=0)
    distance = torch.full((m, K), torch.inf, dtype=targets.dtype)
    distance[:, 0] = 0
    distance = distance.view(-1)
    level = _Level(fr, m, K, children)
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

    Flat arrays make every step one contiguous pass, which is what this costs.
    """

    def __init__(self, fr: Frame, m: int, K: int, children: int) -> None:
        self.fr, self.m, self.K, self.children = fr, m, K, children
        dtype = fr.L.dtype
        self.integer = torch.int32 if dtype == torch.float32 else torch.int64
        count = K * children
        self.mask = (1 << (count - 1).bit_length()) - 1
        self.numbers = torch.arange(count, dtype=self.integer).repeat(m).view(m, children, K)
        self.keys = torch.empty_like(self.numbers)
        self.first = (torch.arange(m) * K).repeat_interleave(K)
        # Schnorr–Euchner order: to the side of the centre first, then to and fro.
        order = [(c + 1) // 2 if c % 2 else -(c // 2) for c in range(children)]
        self.steps = torch.tensor(order, dtype=dtype)

    def decide(
        self, centre: torch.Tensor, distance: torch.Tensor, i: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Parents, coefficients of row i and squared distances of the K best children."""
        square = float(self.fr.L[i, i]) ** 2
        near, side, gap = self._split(centre, i)
        for c, step in enumerate(self.steps.tolist()):
            off = gap - step
            cost = torch.addcmul(distance, off, off, value=square)
            self._bar(cost, near, side, step, i)
            bits = cost.view(self.integer).view(self.m, self.K)
            torch.bitwise_and(bits, ~self.mask, out=self.keys[:, c])
        chosen = self._select()
        if self.K & (self.K - 1):
            parent, child = chosen % self.K, chosen // self.K
        else:
            parent, child = chosen & (self.K - 1), chosen >> (self.K.bit_length() - 1)
        parent = parent.long()
        step = child.to(centre.dtype) if self.children <= 2 else self.steps.index_select(0, child)
        near, side, gap = self._split(self._take(centre, parent), i)
        distance = self._take(distance, parent)
        off = gap.sub_(step)
        cost = distance.addcmul_(off, off, value=square)
        self._bar(cost, near, side, step, i)
        return parent.add_(self.first), near.addcmul_(side, step), cost

    def _take(self, values: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
        """Each child's own copy of its parent's value."""
        shape = (self.m, self.K)
        return values.view(shape).gather(1, parent.view(shape)).view(-1)

    def _split(
        self, centre: torch.Tensor, i: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The nearest allowed integer, the side (±1) to step to next, and the gap on that side."""
        near = self.fr.clamp(centre.round(), i)
        gap = centre - near
        side = torch.copysign(torch.ones((), dtype=gap.dtype), gap)
        if self.fr.low is not None and self.fr.high is not None:
            beyond = near + side
            side[(beyond < float(self.fr.low[i])) | (beyond > float(self.fr.high[i]))] *= -1
            return near, side, gap.mul_(side)
        return near, side, gap.abs_()

    def _bar(
        self,
        cost: torch.Tensor,
        near: torch.Tensor,
        side: torch.Tensor,
        step: torch.Tensor | float,
        i: int,
    ) -> None:
        """Infinite cost to children outside the box."""
        if self.fr.low is not None and self.fr.high is not None:
            x = near + side * step
            cost.masked_fill_((x < float(self.fr.low[i])) | (x > float(self.fr.high[i])), torch.inf)

    def _select(self) -> torch.Tensor:
        """Numbers (m·K) of the K smallest keys of each target, unordered.

        Non-negative floats order as the integers of the same bits, so that the number can ride in
        the lowest bits of the key and a vectorised integer partition moves both at once.
        """
        keys = self.keys.bitwise_or_(self.numbers).view(self.m, -1)
        if self.children > 1:
            keys.numpy().partition(self.K - 1, axis=1)
        return (keys[:, : self.K] & self.mask).view(-1)
