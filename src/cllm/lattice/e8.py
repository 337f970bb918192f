"""The lattice E8 = D8 ∪ (D8 + ½), densest in eight dimensions."""

from __future__ import annotations

import numpy as np
import torch

from cllm.lattice.root import RootLattice

# Points decoded together: a few arrays of their size stay in the second-level cache.
CHUNK = 4096


class E8(RootLattice):
    """Gosset's lattice, unimodular, minimal norm 2.

    Decoding follows Conway & Sloane 1982 (algorithm 4, the better of two D8 decodings), both cosets
    from one rounding: with d = x - round(x), the errors are |d| in D8 and ½ - |d| in D8 + ½. Squared
    distances less Σ|d|² are odd·(1 - 2·max|d|) and 2 - Σ|d| + odd·2·min|d|, parity repairs included.
    """

    name = "E8"
    dimension = 8
    unit = 0.5
    volume = 1.0
    minimal_norm = 2.0
    kissing_number = 240
    second_moment = 929 / 12960

    def integer_generator(self) -> np.ndarray:
        basis = 2 * np.eye(8, dtype=np.int64) - 2 * np.eye(8, k=-1, dtype=np.int64)
        basis[0, 0] = 4
        basis[7] = 1
        return basis

    def _contains(self, integers: torch.Tensor) -> torch.Tensor:
        same = (integers % 2 == integers[:, :1] % 2).all(dim=1)
        return same & (integers.sum(dim=1) % 4 == 0)

    def _decode_all(self, points: torch.Tensor, out: torch.Tensor) -> None:
        scratch = _Scratch(min(CHUNK, len(points)), points.numpy().dtype)
        for start in range(0, len(points), CHUNK):
            part = slice(start, start + CHUNK)
            scratch.decode(points[part].numpy(), out[part].numpy())


class _Scratch:
    """Buffers of one chunk, used again for the next, and the passes over them.

    NumPy, since its passes start sooner than torch's and its transposition is five times as fast. What
    asks for all coordinates of a point runs on columns, what makes the point runs on rows.
    """

    def __init__(self, size: int, dtype: np.dtype) -> None:
        self.integer = np.dtype(f"i{dtype.itemsize}")
        self.columns, self.other = np.empty((2, 8, size), dtype=dtype)
        self.half = np.empty((4, size), dtype=dtype)
        self.sums = np.empty((2, size), dtype=dtype)
        self.keys = np.empty((4, size), dtype=self.integer)
        self.numbers = np.repeat(np.arange(8, dtype=self.integer)[:, None], size, axis=1)
        self.steps = _steps(dtype)

    def decode(self, x: np.ndarray, out: np.ndarray) -> None:
        """Nearest points (m, 8) to x (m, 8), m at most the size."""
        m = len(x)
        if m < self.columns.shape[1]:
            _Scratch(m, x.dtype).decode(x, out)
            return
        code = self._choose(x)
        # out = round(x) ± step, the sign that of the error.
        error, step = self.other.reshape(m, 8), self.columns.reshape(m, 8)
        np.rint(x, out=out)
        np.subtract(x, out, out=error)
        signs, bits = error.view(self.integer), step.view(self.integer)
        np.bitwise_and(signs, np.iinfo(self.integer).min, out=signs)
        np.take(self.steps, code, axis=0, out=step, mode="clip")
        np.bitwise_xor(bits, signs, out=bits)
        np.add(out, step, out=out)

    def _choose(self, x: np.ndarray) -> np.ndarray:
        """Row of the table of steps for every point: 16·(half coset) + 8·(a flip) + where."""
        error, size = self.columns, self.other
        np.copyto(error, x.T)
        np.rint(error, out=size)
        total, spread = self.sums
        _, change, most, least = self.keys
        self._fold(np.add, size, total)
        np.subtract(error, size, out=error)
        # ⌊x⌋ is round(x) less 1 where the error is negative: sign bits give its parity.
        self._fold(np.bitwise_xor, error.view(self.integer), change)
        np.abs(error, out=size)
        self._fold(np.add, size, spread)
        # The row's number in the lowest bits of |error|: one maximum finds both.
        keys = size.view(self.integer)
        np.bitwise_and(keys, -8, out=keys)
        np.bitwise_or(keys, self.numbers, out=keys)
        self._fold(np.maximum, keys, most)
        self._fold(np.minimum, keys, least)
        return self._code(total, spread)

    def _code(self, total: np.ndarray, spread: np.ndarray) -> np.ndarray:
        """Conditions are masks of all bits or none: integer operations in place of selections."""
        odd, change, most, least = self.keys
        sign = 8 * self.integer.itemsize - 1
        np.copyto(odd, total, casting="unsafe")
        np.left_shift(odd, sign, out=odd)
        np.right_shift(odd, sign, out=odd)
        np.right_shift(change, sign, out=change)
        # Squared distance of each coset, less Σ|d|², with the parity's repair.
        whole, other = total, self.half[0]
        np.multiply(most.view(total.dtype), -2, out=whole)
        np.add(whole, 1, out=whole)
        np.bitwise_and(whole.view(self.integer), odd, out=whole.view(self.integer))
        np.add(least.view(total.dtype), least.view(total.dtype), out=other)
        repair = self.half[1].view(self.integer)
        np.bitwise_xor(odd, change, out=repair)
        np.bitwise_and(other.view(self.integer), repair, out=other.view(self.integer))
        np.subtract(other, spread, out=other)
        np.add(other, 2, out=other)
        np.subtract(other, whole, out=other)
        half = other.view(self.integer)
        np.right_shift(half, sign, out=half)
        # Where half: the least key in place of the most, and the other parity.
        np.bitwise_xor(least, most, out=least)
        np.bitwise_and(least, half, out=least)
        np.bitwise_xor(most, least, out=most)
        np.bitwise_and(change, half, out=change)
        np.bitwise_xor(odd, change, out=odd)
        np.bitwise_and(most, 7, out=most)
        np.bitwise_and(odd, 8, out=odd)
        np.bitwise_and(half, 16, out=half)
        np.bitwise_or(most, odd, out=most)
        return np.bitwise_or(most, half, out=most)

    def _fold(self, operation: np.ufunc, rows: np.ndarray, out: np.ndarray) -> None:
        """The eight rows in one: by halves, which vectorise better than a reduction over rows."""
        half = self.half.view(rows.dtype)
        operation(rows[:4], rows[4:], out=half)
        operation(half[:2], half[2:], out=half[:2])
        operation(half[0], half[1], out=out)


def _steps(dtype: np.dtype) -> np.ndarray:
    """(32, 8): what to add to round(x), in the direction of the error: 1 where D8 flips; ½ in the
    half coset, and -½ where that flips."""
    half, flip, where = np.indices((2, 2, 8)).reshape(3, 32, 1)
    flips = (flip == 1) & (where == np.arange(8))
    return np.where(half == 1, np.where(flips, -0.5, 0.5), np.where(flips, 1.0, 0.0)).astype(dtype)
