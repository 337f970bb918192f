"""Another basis of the same row lattice: (C, R) to (C·U⁻¹, U·R), with U unimodular.

The table C·R stays what it is; what changes is how much is lost when coordinates are snapped to integers,
since nearest plane's error follows the Gram–Schmidt profile of the basis. The rank does not change:
lattice reduction shortens basis vectors, it removes none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm import lattice

SECONDS = 5.0
"""Time for a shortest vector beyond ``EXACT_SHORTEST`` dimensions: the figure is for a report."""
EXACT_SHORTEST = 40
"""Dimension up to which λ1 is found by enumeration, which ends in a second there."""
HKZ_LIMIT = 50
"""Dimension up to which HKZ is within reach."""


@dataclass(frozen=True, kw_only=True)
class BasisFacts:
    """A basis in figures.

    Attributes:
        log2_defect: log₂ of the orthogonality defect ∏‖b_i‖/det, 0 for orthogonal rows.
        profile: log₂‖b*_i‖, (k,).
        mean_ratio_db: arithmetic over geometric mean of ‖b*_i‖², in dB.
        shortest: length of the shortest vector that was found.
        shortest_is_exact: whether that is proved to be λ1.
    """

    log2_defect: float
    profile: tuple[float, ...]
    mean_ratio_db: float
    shortest: float
    shortest_is_exact: bool

    def to_json(self) -> dict[str, Any]:
        """As plain values, the profile by its ends."""
        return {
            "log2_defect": round(self.log2_defect, 3),
            "profile_first": round(self.profile[0], 3),
            "profile_last": round(self.profile[-1], 3),
            "mean_ratio_db": round(self.mean_ratio_db, 3),
            "shortest": self.shortest,
            "shortest_is_exact": self.shortest_is_exact,
        }


@dataclass(frozen=True, kw_only=True)
class Rebased:
    """Core (V, k) and basis (k, D) after the change, U (k, k) as exact integers, and the figures."""

    core: Tensor
    basis: Tensor
    transform: np.ndarray
    before: BasisFacts
    after: BasisFacts

    @property
    def is_trivial(self) -> bool:
        """Whether U only reorders rows and changes signs, as on orthogonal rows it must."""
        return bool((np.abs(self.transform).sum(axis=0) == 1).all())


def basis_facts(basis_rd: Tensor) -> BasisFacts:
    """Figures of a basis (k, D). Raises ``ValueError`` if its rows are dependent."""
    rows = basis_rd.detach().double().cpu().numpy()
    exact = len(rows) <= EXACT_SHORTEST
    method, limit = ("exact", None) if exact else ("bkz", SECONDS)
    found = lattice.shortest(rows, method, max_seconds=limit)
    return BasisFacts(
        log2_defect=lattice.orthogonality_defect(rows, log=True) / np.log(2),
        profile=tuple(map(float, lattice.profile(rows))),
        mean_ratio_db=lattice.mean_ratio_db(rows),
        shortest=found.norm,
        shortest_is_exact=found.is_exact,
    )


def rebase(core_vr: Tensor, basis_rd: Tensor, method: str) -> Rebased:
    """Reduce the rows of ``basis_rd`` by ``lll``, ``bkz`` or ``hkz``, and carry the core along.

    Raises ``ValueError`` for dependent rows, an unknown method, or ``hkz`` beyond its reach.
    """
    rows = basis_rd.detach().double().cpu()
    if method == "hkz" and len(rows) > HKZ_LIMIT:
        raise ValueError(
            f"hkz enumerates in {len(rows)} dimensions, and {HKZ_LIMIT} are in reach; use bkz"
        )
    reduced = lattice.reduce(rows.numpy(), method=method)
    transform = reduced.transform
    basis = torch.from_numpy(reduced.basis)
    inverse = _inverse(transform, rows.numpy(), reduced.basis)
    core = core_vr.detach().double().cpu() @ torch.from_numpy(inverse.astype(np.float64))
    return Rebased(
        core=core.to(core_vr.dtype).to(core_vr.device),
        basis=basis.to(basis_rd.dtype).to(basis_rd.device),
        transform=transform,
        before=basis_facts(basis_rd),
        after=basis_facts(basis),
    )


def _inverse(transform: np.ndarray, rows: np.ndarray, reduced: np.ndarray) -> np.ndarray:
    """U⁻¹ in exact integers: rows = U⁻¹ · reduced in floats, rounded, and checked."""
    found = np.rint(rows @ np.linalg.pinv(reduced)).astype(np.int64).astype(object)
    identity = found @ transform.astype(object)
    if not (identity == np.eye(len(rows), dtype=int)).all():
        raise ArithmeticError(
            f"the basis of shape {rows.shape} is too badly conditioned to invert its transform"
        )
    return np.asarray(found)
