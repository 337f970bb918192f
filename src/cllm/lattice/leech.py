"""The Leech lattice Λ24 and an exact decoder for batches.

A point is (m + 2c + 4b)/√8 with m in {0, 1}, c a Golay codeword and b integers whose sum has the
parity of m (Conway & Sloane 1999, chapter 4, section 11). Maximum-likelihood decoding after Vardy &
Be'ery, "Maximum-likelihood decoding of the Leech lattice", IEEE Trans. Inf. Theory 39 (1993): through
the hexacode, one quarter of the lattice (m and the parity of the columns) at a time. Where they save
scalar operations by sorting and look-ups, this does the full min-plus sums of every hexacode word,
because those are long vector operations over the batch.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch

from cllm.lattice.golay import column_patterns, golay, hexacode
from cllm.lattice.root import RootLattice, flip_worst, parity


class Leech(RootLattice):
    """Unimodular, minimal norm 4, no vectors of norm 2."""

    name = "Leech"
    dimension = 24
    unit = 1 / math.sqrt(8)
    volume = 1.0
    minimal_norm = 4.0
    kissing_number = 196560
    # Conway & Sloane 1999, table 2.3.
    second_moment = 0.065771
    chunk = 1024

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

    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        quarters = [_Quarter(x, m) for m in (0, 1)]
        bests = [quarter.best(h) for quarter in quarters for h in (0, 1)]
        value = torch.stack([cost for cost, _ in bests])
        word = torch.stack([words for _, words in bests])
        chosen = value.argmin(dim=0)
        word = word.gather(0, chosen[None])[0]
        m, h = chosen // 2, chosen % 2
        return _assemble(x, quarters, m, h, word).mul_(self.unit)


def _code_basis() -> np.ndarray:
    """Twelve independent words of the Golay code, each with its own first coordinate."""
    code = golay()
    first = np.where(code.any(axis=1), code.argmax(axis=1), -1)
    return np.array([code[np.flatnonzero(first == i)[0]] for i in np.unique(first[first >= 0])])


# Hexacode words (64, 6), and for each word the numbers of its three pairs of columns.
_WORDS = torch.from_numpy(hexacode())
_PAIRS = _WORDS[:, 0::2] * 4 + _WORDS[:, 1::2]
# (parity, element, top bit) -> bits of the column.
_PATTERNS = torch.from_numpy(column_patterns())


class _Quarter:
    """Costs of every column for the points of one m, in both column parities.

    In units of 4 with y = (x√8 - m)/4, coordinate i is nearest b where its code bit is 0 and nearest
    b + ½ where it is 1: at |d| and ½ - |d| for d = y - round(y). What moving to the other parity of b
    costs is 1 - 2|d| and 2|d|, in squared distance. Costs are counted from all code bits 0.
    """

    def __init__(self, x: torch.Tensor, m: int) -> None:
        y = (x * math.sqrt(8) - m).mul_(0.25).view(6, 4, -1)
        whole, floor = y.round(), y.floor()
        size = y.sub_(whole).abs_()
        self.m = m
        self.base = size.square().sum(dim=(0, 1))
        # (code bit, column, row, batch): cost, half of the penalty, and parity of b as ±1.
        cost = torch.stack([torch.zeros_like(size), 0.25 - size])
        penalty = torch.stack([0.5 - size, size])
        sign = torch.stack([_sign(whole), _sign(floor)])
        # (bit of row 0, bit of row 1, ...) joined two rows at a time to 4 and then 16 patterns.
        low = _join(*(_at(t, 0, 1) for t in (cost, penalty, sign)))
        high = _join(*(_at(t, 2, 3) for t in (cost, penalty, sign)))
        joined = zip(high, low, strict=True)
        total, half, parity = _join(*((upper[:, None], lower[None]) for upper, lower in joined))
        # Cost with the sum of b even, and odd: (16 patterns, column, 2, batch).
        lean = half * parity
        total = total + half
        by_pattern = torch.stack([total - lean, total + lean], dim=2)
        # (h, element, column, state, batch), state = 2·top bit + parity of b.
        ordered = by_pattern.index_select(0, _PATTERNS.view(-1)).unflatten(0, (2, 4, 2))
        self.columns = ordered.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).contiguous()

    def best(self, h: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Least cost (batch,) over the hexacode in this quarter, and the word that has it."""
        columns = self.columns[h]
        pairs = [_convolve(columns[:, None, 2 * j], columns[None, :, 2 * j + 1]) for j in range(3)]
        first, second, third = (
            pair.flatten(0, 1).index_select(0, _PAIRS[:, j]) for j, pair in enumerate(pairs)
        )
        both = _convolve(first, second)
        # The last pair must bring the top row to parity h and b to parity m.
        need = 2 * h + self.m
        total = both[:, 0] + third[:, need]
        for state in range(1, 4):
            torch.minimum(total, both[:, state] + third[:, state ^ need], out=total)
        least = total.amin(dim=0)
        # Any word that reaches the minimum will do: a product and a maximum vectorise, argmin not.
        numbers = torch.arange(64, dtype=total.dtype)[:, None]
        word = (total == least).to(total.dtype).mul_(numbers).amax(dim=0)
        return least + self.base, word.long()


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


def _convolve(f: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Min-plus convolution over Z2 × Z2 along the second last dimension (of 4)."""
    shape = torch.broadcast_shapes(f.shape, g.shape)
    out = f.new_empty(shape)
    scratch = f.new_empty((*shape[:-2], shape[-1]))
    for state in range(4):
        target = out[..., state, :]
        torch.add(f[..., 0, :], g[..., state, :], out=target)
        for s in range(1, 4):
            torch.add(f[..., s, :], g[..., s ^ state, :], out=scratch)
            torch.minimum(target, scratch, out=target)
    return out


def _assemble(
    x: torch.Tensor, quarters: list[_Quarter], m: torch.Tensor, h: torch.Tensor, word: torch.Tensor
) -> torch.Tensor:
    """The best point (24, batch), in steps of the lattice's unit, of known quarter and word."""
    batch = torch.arange(len(m))
    elements = _WORDS[word].T
    stacked = torch.stack([quarter.columns for quarter in quarters])
    cost = stacked[m, h, elements, torch.arange(6)[:, None], :, batch].transpose(1, 2)
    states = _viterbi(cost, 2 * h + m)
    pattern = _PATTERNS[h, elements, states >> 1]
    # Rows first from here on: (4, 6, batch).
    bits = (pattern >> torch.arange(4)[:, None, None] & 1).to(x.dtype)
    y = (x * math.sqrt(8) - m).mul_(0.25).view(6, 4, -1).transpose(0, 1).contiguous()
    b = y.sub_(bits * 0.5).round()
    error = y.sub_(b)
    # To the other parity of b at the cheapest coordinate of a column that needs it.
    odd = parity(b.sum(dim=0) - (states & 1)).view(-1)
    flip_worst(b.view(4, -1), error.view(4, -1), error.abs().view(4, -1), odd)
    return (4 * b + 2 * bits).transpose(0, 1).reshape(24, -1) + m


def _viterbi(cost: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    """States (6, batch) of the columns, exclusive or ``need`` (batch,), of least total cost.

    cost: (6, 4, batch). A backward pass over the decisions of a four-state trellis.
    """
    states = torch.arange(4)
    before = states[:, None] ^ states
    reached, decisions = cost[0], []
    for column in cost[1:]:
        reached, taken = (column[:, None] + reached[before]).min(dim=0)
        decisions.append(taken)
    state, out = need, torch.empty(6, len(need), dtype=torch.long)
    for j in range(5, 0, -1):
        out[j] = decisions[j - 1].gather(0, state[None])[0]
        state = state ^ out[j]
    out[0] = state
    return out
