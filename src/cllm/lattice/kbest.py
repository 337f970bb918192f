"""K-best decoding: nearest plane with a beam of K partial solutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cllm.lattice.babai import Frame
from cllm.lattice.kbest_compiled import compiled_offers

# Coefficients a line of 32 bytes of float32 holds beside the beam's origin; the line moves as one.
BLOCK = 7
LINE = BLOCK + 1
# Blocks a group, up to whose end the other rows wait for what it contributes to them.
GROUP = 4
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
    lined = _Lined(fr)
    for start in range(0, len(targets), CHUNK):
        part = targets[start : start + CHUNK]
        # Code is compiled for full chunks; what remains would compile once more.
        whole = compiled and len(part) == CHUNK
        out[start : start + CHUNK] = _chunk(lined, part, K, children, whole)
    return out


class _Lined:
    """L and Q with their rows dealt to lines of ``LINE`` places. The last of each line is left empty, for
    the beam's origin, and so are places of the first line where the rows do not come out even.

    Attributes:
        count: lines of all rows.
        L, Q: zero where a row or column is empty.
        weights: (count, LINE, LINE). Of line b, row j takes a beam's line (open coordinates, decided
            coefficients, origin) to the centre of coefficient j: its coordinate less what the line's
            decided coefficients contribute, over r_j.
    """

    def __init__(self, fr: Frame) -> None:
        self.fr = fr
        n = len(fr.L)
        self.count = -(-n // BLOCK)
        first = n - (self.count - 1) * BLOCK
        self.rows = [list(range(first))]
        self.rows += [list(range(i, i + BLOCK)) for i in range(first, n, BLOCK)]
        self.places = torch.tensor(
            [b * LINE + j for b, row in enumerate(self.rows) for j in range(len(row))]
        )
        self.Q = fr.Q.new_zeros(self.count * LINE, fr.Q.shape[1])
        self.Q[self.places] = fr.Q
        self.L = fr.L.new_zeros(self.count * LINE, self.count * LINE)
        self.L[self.places[:, None], self.places] = fr.L
        self.weights = fr.L.new_zeros(self.count, LINE, LINE)
        for b, rows in enumerate(self.rows):
            w = len(rows)
            square = self.square(b, b)[:w, :w]
            centre = torch.eye(w, dtype=fr.L.dtype) - torch.tril(square, -1).T
            self.weights[b, :w, :w] = centre / torch.diagonal(square)[:, None]

    def square(self, a: int, b: int) -> torch.Tensor:
        """What coefficients of line a contribute to the coordinates of line b."""
        return self.L[a * LINE : (a + 1) * LINE, b * LINE : (b + 1) * LINE]


def _chunk(
    lined: _Lined, targets: torch.Tensor, K: int, children: int, compiled: bool
) -> torch.Tensor:
    m = len(targets)
    level = _Level(lined.fr, m, K, children, compiled)
    # Beam k of target t is number t·K + k, so that a target's beams are gathered from one place.
    opened = (targets @ lined.Q.T).repeat_interleave(K, dim=0)
    decided = []
    for stop in range(lined.count, 0, -GROUP):
        begin = max(0, stop - GROUP)
        lines, origin = _group(lined, level, opened, begin, stop)
        decided.append((begin, lines, origin))
        if begin:
            cut, end = begin * LINE, stop * LINE
            opened = opened[:, :cut].index_select(0, origin)
            opened.addmm_(torch.cat(lines, dim=1), lined.L[cut:end, :cut], alpha=-1)
    out = targets.new_empty(m, lined.count * LINE)
    beam = torch.from_numpy(level.distance).view(m, K).argmin(dim=1).add_(level.first[::K])
    for begin, lines, origin in reversed(decided):
        for b, line in enumerate(lines, start=begin):
            out[:, b * LINE : (b + 1) * LINE] = line[beam]
        beam = origin[beam]
    return out[:, lined.places]


def _group(
    lined: _Lined, level: _Level, opened: torch.Tensor, begin: int, stop: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Decide the lines [begin, stop): each (m·K, LINE), and the beams (m·K,) that they began as."""
    every = torch.arange(len(opened)) * (opened.shape[1] // LINE)
    lines = [_take(opened.view(-1, LINE), every + b) for b in range(begin, stop)]
    origin = None
    for number in reversed(range(len(lines))):
        lines[number], parent = _line(lined, level, lines[number], begin + number)
        origin = parent if origin is None else origin[parent]
        for other in range(len(lines)):
            if other != number:
                lines[other] = _take(lines[other], parent)
            if other < number:
                square = lined.square(begin + number, begin + other)
                _subtract_product(lines[other], lines[number], square)
    assert origin is not None
    return lines, origin


def _line(
    lined: _Lined, level: _Level, line: torch.Tensor, b: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decide line b from the right, and say which beam each began as."""
    line[:, -1] = level.slots
    centre = line.new_empty(len(line))
    for j in reversed(range(len(lined.rows[b]))):
        torch.mv(line, lined.weights[b, j], out=centre)
        parent, x = level.decide(centre.numpy(), lined.rows[b][j])
        line = _take(line, torch.from_numpy(parent))
        line.numpy()[:, j] = x
    return line, line[:, -1].long().add_(level.first)


def _take(lines: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    # Of whole lines NumPy's gather is several times as fast as torch's.
    return torch.from_numpy(np.take(lines.numpy(), numbers.numpy(), axis=0, mode="clip"))


def _subtract_product(out: torch.Tensor, lines: torch.Tensor, square: torch.Tensor) -> None:
    """out -= lines @ square. Products of two lines in one, where they pair, are three times as fast: a
    row of eight is too short for BLAS."""
    if len(out) % 2 == 0:
        out, lines = out.view(-1, 2 * LINE), lines.view(-1, 2 * LINE)
        square = torch.block_diag(square, square)
    out.addmm_(lines, square, alpha=-1)


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
        self.slots = torch.arange(K, dtype=fr.L.dtype).repeat(m)
        self.distance = np.full(size, np.inf, dtype=dtype)
        self.distance[::K] = 0
        # Schnorr–Euchner order: to the side of the centre first, then to and fro.
        self.steps = [dtype.type((c + 1) // 2 if c % 2 else -(c // 2)) for c in range(children)]
        self.offers = compiled_offers() if compiled else None
        self.integer = np.dtype(f"i{dtype.itemsize}")
        self.one = dtype.type(1).view(self.integer)
        self.sign = np.iinfo(self.integer).min
        # Child c of beam k of a target is number c·2^s + k, 2^s the least that is K or more.
        self.step = 1 << (K - 1).bit_length()
        self.mask = self.integer.type((1 << (children * self.step - 1).bit_length()) - 1)
        numbers = self.step * np.arange(children, dtype=self.integer)[:, None, None] + np.arange(K)
        self.numbers = np.repeat(numbers.astype(self.integer), m, axis=1).reshape(children, size)
        self.gap, self.side, self.x = np.empty((3, size), dtype=dtype)
        # Children are m·2^s apart.
        self.all_costs, self.all_choices = np.zeros((2, children, m * self.step), dtype=dtype)
        self.costs, self.choices = self.all_costs[:, :size], self.all_choices[:, :size]
        self.key = np.empty(size, dtype=self.integer)
        self.keys = np.empty((size, children), dtype=self.integer)
        self.best, self.place, self.narrow = np.empty((3, m, K), dtype=self.integer)
        self.narrow_first = self.first.numpy().astype(self.integer).reshape(m, K)
        self.child, self.parent = np.empty((2, size), dtype=np.int64)

    def decide(self, centre: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Parents (numbers of beams) and coefficients (m·K,) of row i of the K best children."""
        if self.offers is not None:
            self._offer_compiled(self.offers, centre, i)
        else:
            self._offer(centre, i)
        self._choose()
        np.take(self.all_costs.reshape(-1), self.child, out=self.distance, mode="clip")
        np.take(self.all_choices.reshape(-1), self.child, out=self.x, mode="clip")
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
        """Keys to sort by. Non-negative floats order as the integers of the same bits, so that a child's
        number rides in the lowest bits."""
        for c, cost in enumerate(self.costs):
            np.bitwise_and(cost.view(self.integer), ~self.mask, out=self.key)
            np.bitwise_or(self.key, self.numbers[c], out=self.keys[:, c])

    def _offer_compiled(self, offers: Any, centre: np.ndarray, i: int) -> None:
        box = None
        if self.box is not None:
            box = torch.from_numpy(self.box[0])[i], torch.from_numpy(self.box[1])[i]
        distance, numbers = torch.from_numpy(self.distance), torch.from_numpy(self.numbers)
        square, steps = torch.from_numpy(self.squares)[i], [float(step) for step in self.steps]
        found = offers(
            torch.from_numpy(centre), distance, square, box, numbers, steps, int(self.mask)
        )
        np.copyto(self.costs, found[0].numpy())
        np.copyto(self.choices, found[1].numpy())
        np.copyto(self.keys, found[2].numpy().T)

    def _choose(self) -> None:
        """Places of the best children, and of their beams."""
        keys = self.keys.reshape(self.m, -1)
        if self.children > 1:
            # NumPy sorts so few by a network in registers, faster than it partitions them.
            keys.sort(axis=1)
        best, place, narrow = self.best, self.place, self.narrow
        np.bitwise_and(keys[:, : self.K], self.mask, out=best)
        np.bitwise_and(best, self.step - 1, out=place)
        # The number of the child times the step, and then times m.
        np.subtract(best, place, out=narrow)
        np.multiply(narrow, self.m, out=narrow)
        np.add(place, self.narrow_first, out=place)
        np.copyto(self.parent.reshape(place.shape), place)
        np.add(narrow, place, out=place)
        np.copyto(self.child.reshape(place.shape), place)
