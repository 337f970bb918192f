"""Babai's two decoders: rounding, and the nearest plane by blocked back-substitution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cllm.lattice.gso import lq

# Rows solved one at a time before a matrix product carries them to the rest.
BLOCK = 16
# Targets worked on together: their rows of a block stay in the second-level cache.
CHUNK = 4096


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

    def clamp(self, x: torch.Tensor, row: int) -> torch.Tensor:
        """Coefficients of ``row`` kept inside the box, in place."""
        if self.low is not None and self.high is not None:
            x.clamp_(float(self.low[row]), float(self.high[row]))
        return x


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


def nearest_plane(fr: Frame, targets: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Nearest plane (Babai, Combinatorica 6, 1986, section 3): coefficients (m, n).

    Back-substitution on t·Qᵀ from the last row up. Blocks of rows are solved in cache and carried to
    the rows above by matrix products, as in a triangular solve. Targets lie along the contiguous
    dimension.
    """
    n = len(fr.L)
    out = targets.new_empty(len(targets), n)
    for start in range(0, len(targets), chunk):
        Y = fr.Q @ targets[start : start + chunk].T
        X = torch.empty_like(Y)
        for stop in range(n, 0, -BLOCK):
            begin = max(0, stop - BLOCK)
            _solve_block(fr, Y, X, begin, stop)
            if begin:
                Y[:begin].addmm_(fr.L[begin:stop, :begin].T, X[begin:stop], alpha=-1)
        out[start : start + chunk] = X.T
    return out


def _solve_block(fr: Frame, Y: torch.Tensor, X: torch.Tensor, begin: int, stop: int) -> None:
    for i in range(stop - 1, begin - 1, -1):
        x = torch.div(Y[i], fr.L[i, i], out=X[i]).round_()
        fr.clamp(x, i)
        if i > begin:
            Y[begin:i].addr_(fr.L[i, begin:i], x, alpha=-1)
