"""The Leech lattice Λ24 and an exact decoder for batches.

A point is (m + 2c + 4b)/√8 with m in {0, 1}, c a Golay codeword and b integers whose sum has the
parity of m (Conway & Sloane 1999, chapter 4, section 11). Maximum-likelihood decoding after Vardy &
Be'ery, "Maximum-likelihood decoding of the Leech lattice", IEEE Trans. Inf. Theory 39 (1993): through
the hexacode, one quarter of the lattice (m, and the parity h of the columns) at a time. A compiled
kernel (leech.cpp) decides every hexacode word of every quarter exactly. Where there is no compiler, torch
does so in passes: every word gets a lower bound, by leaving out the two parity conditions; in each quarter
the word of least bound is decoded exactly, and then every word whose bound is below the best of the four:
about one is.
"""

from __future__ import annotations

import itertools
import math
import warnings
from functools import cached_property

import numpy as np
import torch

from cllm.lattice import leech_kernel
from cllm.lattice.golay import column_patterns, golay, hexacode
from cllm.lattice.root import InColumns, flip_worst, parity


class Leech(InColumns):
    """Unimodular, minimal norm 4, no vectors of norm 2."""

    name = "Leech"
    dimension = 24
    unit = 1 / math.sqrt(8)
    volume = 1.0
    minimal_norm = 4.0
    kissing_number = 196560
    # Conway & Sloane 1999, table 2.3.
    second_moment = 0.065771

    def integer_generator(self) -> np.ndarray:
        """LLL-reduced: 2c for a basis of the Golay code, 4(e_i + e_j), 8e_i and one odd vector
        generate the lattice (Conway & Sloane 1999, chapter 4, section 11)."""
        return self._basis.copy()

    @cached_property
    def _basis(self) -> np.ndarray:
        from cllm.lattice.reduction import reduce

        code = _code_basis()
        pivots = {int(np.flatnonzero(word)[0]) for word in code}
        first, *others = [i for i in range(24) if i not in pivots]
        rows = np.zeros((24, 24), dtype=np.int64)
        rows[:12] = 2 * code
        # Twice the odd vector is 2·(1, ..., 1) less 8e, and the word of all ones has the first word
        # of any echelon basis in it: so the odd vector can stand in that word's place.
        rows[0] = 1
        rows[0, first] = -3
        for row, i in enumerate(others, start=12):
            rows[row, [first, i]] = 4
        rows[23, first] = 8
        return np.asarray(reduce(rows).basis)

    def _contains(self, integers: torch.Tensor) -> torch.Tensor:
        m = integers[:, :1] % 2
        same = (integers % 2 == m).all(dim=1)
        bits = ((integers - m) // 2) % 2
        check = torch.from_numpy(_code_basis())
        # The Golay code is its own dual: a word belongs to it when it is orthogonal to a basis.
        codeword = ((bits @ check.T) % 2 == 0).all(dim=1)
        b = (integers - m - 2 * bits) // 4
        return same & codeword & ((b.sum(dim=1) - m[:, 0]) % 2 == 0)

    def _decode_all(self, points: torch.Tensor, out: torch.Tensor) -> None:
        kernel = leech_kernel.load(points.dtype)
        if not isinstance(kernel, str):
            kernel(points, out)
            return
        # Python shows a warning of one place and text once.
        text = f"Leech points are found by passes of torch, many times slower: {kernel}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        super()._decode_all(points, out)

    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        costs = _Costs(x)
        bound = costs.bounds()
        points = torch.arange(x.shape[1])
        firsts = _least(bound.view(4, 64, -1)) + torch.arange(0, 256, 64)[:, None]
        value, quarter = costs.exact(firsts.view(-1), points.repeat(4)).view(4, -1).min(dim=0)
        word = firsts.gather(0, quarter[None])[0]
        bound.scatter_(0, firsts, torch.inf)
        # NumPy's search is the faster one.
        hits = torch.from_numpy(np.flatnonzero((bound < value).numpy()))
        rivals, where = hits // x.shape[1], hits % x.shape[1]
        rival_value = costs.exact(rivals, where)
        value.scatter_reduce_(0, where, rival_value, "amin")
        wins = rival_value == value[where]
        # A rival that ties with another is chosen by its number, so that the answer is determined.
        winner = torch.full_like(word, -1)
        winner.scatter_reduce_(0, where[wins], rivals[wins], "amax")
        word = torch.where(winner >= 0, winner, word)
        return costs.assemble(x, word).mul_(self.unit)


def _code_basis() -> np.ndarray:
    """Twelve independent words of the Golay code, each with its own first coordinate."""
    code = golay()
    first = np.where(code.any(axis=1), code.argmax(axis=1), -1)
    return np.array([code[np.flatnonzero(first == i)[0]] for i in np.unique(first[first >= 0])])


# Words of all four quarters (256, 6), numbered 64·(2m + h) + hexacode word.
_WORDS = torch.from_numpy(hexacode()).repeat(4, 1)
_QUARTER = torch.arange(256) // 64
# For each hexacode word the numbers of its three pairs of columns.
_PAIRS = _WORDS[:64, 0::2] * 4 + _WORDS[:64, 1::2]
# (parity, element, top bit) -> bits of the column.
_PATTERNS = torch.from_numpy(column_patterns())
# (2·column + top bit, word): where the word's pattern of the column stands in (m, pattern, column).
_PLACES = (
    (_QUARTER // 2 * 16)[:, None, None] + _PATTERNS[_QUARTER[:, None] % 2, _WORDS]
) * 6 + torch.arange(6)[:, None]
_PLACES = _PLACES.view(256, 12).T.contiguous()
# State s and state t of two columns make state s ^ t of both.
_BEFORE = torch.arange(4)[:, None] ^ torch.arange(4)


class _Costs:
    """Squared distances, in units of 4/√8, of the columns of a batch x (24, batch) from every choice.

    In those units coordinate i is y = (x√8 - m)/4, and nearest b where its code bit is 0 and nearest
    b + ½ where it is 1: at |d| and ½ - |d| for d = y - round(y). Moving to the other parity of b
    costs 1 - 2|d| and 2|d| more, in squared distance. Costs are counted from all code bits 0.

    ``total`` (m, pattern of code bits, column, batch) is a column's cost whatever the parity of its b,
    ``extra`` (the same shape) what the other parity costs more, with the sign + where the first is even;
    ``base`` (m, batch) is what they are counted from.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self.batch = x.shape[1]
        self.total, self.extra = x.new_empty(2, 2, 16, 6, self.batch)
        self.base = x.new_empty(2, self.batch)
        for m in (0, 1):
            self._fill(x, m)

    def _fill(self, x: torch.Tensor, m: int) -> None:
        y = (x * math.sqrt(8) - m).mul_(0.25).view(6, 4, -1)
        whole, floor = y.round(), y.floor()
        size = y.sub_(whole).abs_()
        self.base[m] = size.square().sum(dim=(0, 1))
        # (code bit, column, row, batch): cost, penalty, and parity of b as ±1.
        cost = torch.stack([torch.zeros_like(size), 0.25 - size])
        penalty = torch.stack([1 - 2 * size, 2 * size])
        sign = torch.stack([_sign(whole), _sign(floor)])
        # (bit of row 0, bit of row 1, ...) joined two rows at a time to 4 and then 16 patterns.
        low = _join(*(_at(t, 0, 1) for t in (cost, penalty, sign)))
        high = _join(*(_at(t, 2, 3) for t in (cost, penalty, sign)))
        shape = (4, 4, 6, self.batch)
        (cost, penalty, sign), (cost_low, penalty_low, sign_low) = high, low
        torch.add(cost[:, None], cost_low, out=self.total[m].view(shape))
        extra = self.extra[m].view(shape)
        torch.minimum(penalty[:, None], penalty_low, out=extra)
        extra.mul_(sign[:, None] * sign_low)

    def bounds(self) -> torch.Tensor:
        """A lower bound (256, batch) of the cost of every word: each column in its best state."""
        relaxed = self.total.new_empty(2, 2, 4, 6, self.batch)
        for h, element in itertools.product(range(2), range(4)):
            first, second = (self.total[:, int(p)] for p in _PATTERNS[h, element])
            torch.minimum(first, second, out=relaxed[:, h, element])
        relaxed = relaxed.view(4, 4, 6, -1)
        out = relaxed.new_empty(4, 64, self.batch)
        for quarter, columns in enumerate(relaxed):
            columns[:, 0] += self.base[quarter // 2]
            first, second, third = (
                (columns[:, None, j] + columns[None, :, j + 1]).flatten(0, 1) for j in (0, 2, 4)
            )
            torch.index_select(second, 0, _PAIRS[:, 1], out=out[quarter])
            out[quarter] += third.index_select(0, _PAIRS[:, 2])
            # The words are in the order of their first three elements: four to a first pair.
            out[quarter].view(16, 4, -1).add_(first[:, None])
        return out.view(256, -1)

    def exact(self, word: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
        """Least cost (count,) of pairs of words and points, both parity conditions kept."""
        cost = self._states(word, point)
        reached = cost[0]
        for column in cost[1:]:
            reached = (column[:, None] + reached[_BEFORE]).amin(dim=0)
        quarter = _QUARTER[word]
        need = _need(quarter)
        return reached.gather(0, need[None])[0] + self.base[quarter // 2, point]

    def _states(self, word: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
        """Costs (6, 4, count) of the columns of pairs of words and points, in each state: 2·(top bit) +
        (parity of the column's b)."""
        place = (_PLACES * self.batch)[:, word] + point
        total, extra = (
            t.view(-1).index_select(0, place.view(-1)).view(6, 2, -1)
            for t in (self.total, self.extra)
        )
        even, odd = total - extra.clamp(max=0), total + extra.clamp(min=0)
        return torch.stack([even, odd], dim=2).view(6, 4, -1)

    def assemble(self, x: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
        """The best point (24, batch) of the word of every point, in steps of the lattice's unit."""
        quarter = _QUARTER[word]
        m = quarter // 2
        states = _viterbi(self._states(word, torch.arange(self.batch)), _need(quarter))
        pattern = _PATTERNS[quarter % 2, _WORDS[word].T, states >> 1]
        # Rows first from here on: (4, 6, batch).
        bits = (pattern >> torch.arange(4)[:, None, None] & 1).to(x.dtype)
        y = (x * math.sqrt(8) - m).mul_(0.25).view(6, 4, -1).transpose(0, 1).contiguous()
        b = y.sub_(bits * 0.5).round()
        error = y.sub_(b)
        # To the other parity of b at the cheapest coordinate of a column that needs it.
        odd = parity(b.sum(dim=0) - (states & 1)).view(-1)
        flip_worst(b.view(4, -1), error.view(4, -1), error.abs().view(4, -1), odd)
        return (4 * b + 2 * bits).transpose(0, 1).reshape(24, -1) + m


def _least(values: torch.Tensor) -> torch.Tensor:
    """Index along dimension 1 of a minimum (the last, of equals): products and maxima vectorise,
    argmin does not."""
    numbers = torch.arange(values.shape[1], dtype=values.dtype)[:, None]
    hits = (values == values.amin(dim=1, keepdim=True)).to(values.dtype)
    return hits.mul_(numbers).amax(dim=1).long()


def _need(quarter: torch.Tensor) -> torch.Tensor:
    """The state that the columns must add up to: top row of parity h, b of parity m."""
    return 2 * (quarter % 2) + quarter // 2


def _viterbi(cost: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    """States (6, batch) of the columns, exclusive or ``need`` (batch,), of least total cost.

    cost: (6, 4, batch). Back through a four-state trellis.
    """
    reached = [cost[0]]
    for column in cost[1:5]:
        reached.append((column[:, None] + reached[-1][_BEFORE]).amin(dim=0))
    every = torch.arange(4)[:, None]
    state, out = need, torch.empty(6, len(need), dtype=torch.long)
    for j in range(5, 0, -1):
        low, one, two, three = cost[j] + reached[j - 1].gather(0, state ^ every)
        # Selections in place of argmin, which does not vectorise.
        right, left = three < two, one < low
        upper = torch.minimum(two, three) < torch.minimum(low, one)
        out[j] = torch.where(upper, right, left).long().add_(upper, alpha=2)
        state = state ^ out[j]
    out[0] = state
    return out


def _sign(b: torch.Tensor) -> torch.Tensor:
    """+1 for even and -1 for odd whole numbers."""
    half = b * 0.5
    return (half - half.floor()).mul_(-4).add_(1)


def _at(t: torch.Tensor, i: int, j: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows i and j of a (bit, column, row, batch) tensor, bits of j before those of i."""
    return t[:, None, :, j], t[None, :, :, i]


def _join(
    cost: tuple[torch.Tensor, torch.Tensor],
    penalty: tuple[torch.Tensor, torch.Tensor],
    sign: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    joined = cost[0] + cost[1], torch.minimum(*penalty), sign[0] * sign[1]
    return joined[0].flatten(0, 1), joined[1].flatten(0, 1), joined[2].flatten(0, 1)
