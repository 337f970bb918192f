"""A dense table onto the factors of another kind, in least squares."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy import sparse


def check_finite(table_vd: Tensor, name: str = "table") -> None:
    """Raise ``ValueError`` for a table with entries that are NaN or infinite."""
    if not bool(torch.isfinite(table_vd).all()):
        raise ValueError(
            f"the {name} of shape {tuple(table_vd.shape)} holds NaN or infinity; take an earlier checkpoint"
        )


def spectrum(table_vd: Tensor) -> np.ndarray:
    """Eigenvalues (D,) of the uncentred covariance EᵀE / V, largest first, float64.

    Raises ``ValueError`` for entries that are not finite.
    """
    wide = table_vd.detach().double().cpu()
    check_finite(wide)
    values = torch.linalg.eigvalsh(wide.T @ wide / max(len(wide), 1))
    return np.asarray(values.flip(0).clamp_min(0).numpy())


def retained(table_vd: Tensor, rank: int) -> float:
    """The share of a table's energy ‖E‖² that its best approximation of ``rank`` keeps."""
    values = spectrum(table_vd)
    total = values.sum()
    return float(values[:rank].sum() / total) if total > 0 else 1.0


def rank_for(table_vd: Tensor, share: float) -> int:
    """The least rank that retains ``share`` of a table's energy.

    Raises ``ValueError`` if ``share`` is not in (0, 1], or for entries that are not finite.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share to retain must be above 0 and at most 1, not {share}")
    values = spectrum(table_vd)
    kept = np.cumsum(values) / max(values.sum(), np.finfo(float).tiny)
    return min(int(np.searchsorted(kept, share - 1e-12)) + 1, len(values))


def best_factors(table_vd: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Core (V, k) and basis (k, D) whose product is nearest to the table (Eckart & Young 1936).

    The basis's rows are orthogonal and of length √(D/k), so that the coordinates have the scale of the
    table's entries.
    """
    wide = table_vd.detach().double()
    width = wide.shape[1]
    # The right singular vectors from the (D, D) Gram matrix: V may be a million.
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    length = math.sqrt(width / rank)
    basis = vectors.flip(1)[:, :rank].T * length
    core = wide @ basis.T / length**2
    return core.to(table_vd.dtype), basis.to(table_vd.dtype)


def piece_vectors(incidence_vp: sparse.csr_matrix, core_vr: Tensor) -> Tensor:
    """Pieces' vectors (P, r) with the least ‖incidence · pieces − core‖², and of these the shortest.

    By LSMR (Fong & Saunders 2011) from zero, a column at a time; the matrix stays sparse.
    """
    from scipy.sparse.linalg import lsmr  # generation starts sooner without it

    target = core_vr.detach().double().cpu().numpy()
    columns = [lsmr(incidence_vp, column, atol=1e-7, btol=1e-7)[0] for column in target.T]
    return torch.from_numpy(np.stack(columns, axis=1)).to(core_vr.dtype).to(core_vr.device)
