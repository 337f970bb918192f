"""Babai's two decoders: rounding, and the nearest plane by blocked back-substitution."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cllm.lattice.check import empty
from cllm.lattice.gso import lq


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A basis prepared for decoding: B = L Q, in the targets' dtype, and optional box bounds.

    ``low`` and ``high`` (n,) bound the coefficients and are None for the whole lattice.
    """

    basis: torch.Tensor
    L: torch.Tensor
    Q: torch.Tensor
    low: torch.Tensor | None
    high: torch.Tensor | None


def frame(B: np.ndarray, dtype: torch.dtype, bounds: tuple[np.ndarray, np.ndarray] | None) -> Frame:
    """Factor a checked basis once for all targets. Raises ``ValueError`` on rank deficiency."""
    L, Q = lq(B)
    low, high = (None, None) if bounds is None else (torch.from_numpy(b) for b in bounds)
    return Frame(
        basis=torch.from_numpy(np.ascontiguousarray(B)).to(dtype),
        L=torch.from_numpy(L).to(dtype).contiguous(),
        Q=torch.from_numpy(Q).to(dtype).contiguous(),
        low=low,
        high=high,
    )


def rounding(fr: Frame, targets: torch.Tensor) -> torch.Tensor:
    """Round-off (Babai, Combinatorica 6, 1986, section 2): coefficients (m, n) = round(t·B⁺)."""
    # B⁺ = Qᵀ L^{-1}; the basis is inverted in float64, so that only the targets' precision counts.
    identity = torch.eye(len(fr.L), dtype=torch.float64)
    inverse = torch.linalg.solve_triangular(fr.L.double(), identity, upper=False)
    x = targets @ (fr.Q.double().T @ inverse).to(targets.dtype)
    x.round_()
    if fr.low is not None and fr.high is not None:
        x = torch.maximum(torch.minimum(x, fr.high.to(x.dtype)), fr.low.to(x.dtype))
    return x


def nearest_plane(fr: Frame, targets: torch.Tensor) -> torch.Tensor:
    """Nearest plane (Babai, Combinatorica 6, 1986, section 3): coefficients (m, n)."""
    out = empty((len(targets), len(fr.L)), targets.dtype)
    solver = NearestPlane(fr)
    for start in range(0, len(targets), solver.chunk):
        part = slice(start, start + solver.chunk)
        np.copyto(out[part].numpy(), solver(targets[part]).numpy())
    return out


class NearestPlane:
    """Back-substitution on t·Qᵀ from the last row up, for a chunk of targets at a time.

    Targets lie along the contiguous dimension. What the rows below contribute comes to a block of rows by
    one matrix product, and within the block, in cache, to a row by a matrix-vector product: two calls a
    row in all. Rows are divided by their diagonal beforehand.

    Attributes:
        chunk: targets to call with for speed.
    """

    @staticmethod
    def chunk_of(n: int) -> int:
        """``chunk`` in dimension n."""
        # Scratch of a chunk and a block's rows stay in the caches; no power of two, so that a column's
        # elements do not all fall into one set of a cache.
        return 3088 if n <= 128 else 1040

    @classmethod
    def of_each_thread(cls, fr: Frame) -> Callable[[torch.Tensor], torch.Tensor]:
        """A solver's call, for which each thread makes a solver of its own: they hold buffers."""
        kept = threading.local()

        def decode(targets: torch.Tensor) -> torch.Tensor:
            if not hasattr(kept, "solver"):
                kept.solver = cls(fr)
            answer: torch.Tensor = kept.solver(targets)
            return answer

        return decode

    def __init__(self, fr: Frame) -> None:
        n = len(fr.L)
        self.chunk, self.block = self.chunk_of(n), 16 if n <= 128 else 32
        diagonal = torch.diagonal(fr.L)
        self._columns = (fr.L / diagonal).T.contiguous()
        self._Q = fr.Q / diagonal[:, None]
        self._box = None if fr.low is None or fr.high is None else (fr.low.numpy(), fr.high.numpy())
        self._buffers(0)

    def _buffers(self, size: int) -> None:
        """Buffers for ``size`` targets, and all the views of them that the calls take."""
        n = len(self._columns)
        self._Y, self._X = self._Q.new_empty(2, n, size)
        self._blocks = []
        for stop in range(n, 0, -self.block):
            begin = max(0, stop - self.block)
            block = None
            if stop < n:
                block = self._Y[begin:stop], self._columns[begin:stop, stop:], self._X[stop:]
            rows = [self._row(i, stop) for i in range(stop - 1, begin - 1, -1)]
            self._blocks.append((block, rows))

    def _row(self, i: int, stop: int) -> tuple[Any, ...]:
        y, x = self._Y[i], self._X[i]
        after = slice(i + 1, stop)
        below = self._X[after].T if i + 1 < stop else None
        return y, below, self._columns[i, after], y.numpy(), x.numpy(), i

    def __call__(self, targets: torch.Tensor) -> torch.Tensor:
        """Coefficients (m, n), a transposed view of a buffer that the next call overwrites."""
        if len(targets) != self._Y.shape[1]:
            self._buffers(len(targets))
        torch.mm(self._Q, targets.T, out=self._Y)
        for block, rows in self._blocks:
            if block is not None:
                open_rows, columns, decided = block
                open_rows.addmm_(columns, decided, alpha=-1)
            for y, below, column, centre, x, i in rows:
                if below is not None:
                    y.addmv_(below, column, alpha=-1)
                np.rint(centre, out=x)
                if self._box is not None:
                    np.clip(x, self._box[0][i], self._box[1][i], out=x)
        return self._X.T
