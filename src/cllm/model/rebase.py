"""Another basis of the same row lattice: (C, R) to (C·U⁻¹, U·R), with U unimodular.

The table C·R stays what it is; what changes is how much is lost when coordinates are snapped to integers,
since nearest plane's error follows the Gram–Schmidt profile of the basis. The rank does not change:
lattice reduction shortens basis vectors, it removes none.

Lengths and angles are those of a metric M (D, D): the Gram matrix of the basis is R M Rᵀ, that of the rows
of R M^½. Principal axes are orthogonal under the identity, so that reduction has nothing to do there; under
what errors cost (``cllm.model.table_metric``) they are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm import lattice
from cllm.model.factors import check_finite
from cllm.model.table_metric import as_metric, roots

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


def basis_facts(basis_rd: Tensor, metric: np.ndarray | None = None) -> BasisFacts:
    """Figures of a basis (k, D) under ``metric`` (D, D), none for the identity.

    Raises ``ValueError`` if its rows are dependent, or for what is no metric of this width.
    """
    return _facts(_measured_rows(basis_rd.detach().double().cpu().numpy(), metric))


def _measured_rows(rows: np.ndarray, metric: np.ndarray | None) -> np.ndarray:
    """Rows whose usual lengths and angles are those of ``rows`` (k, D) under the metric."""
    if metric is None:
        return rows
    return rows @ roots(as_metric(metric, width=rows.shape[1]))[0]


def _facts(rows: np.ndarray) -> BasisFacts:
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


def rebase(
    core_vr: Tensor, basis_rd: Tensor, method: str, metric: np.ndarray | None = None
) -> Rebased:
    """Reduce the rows of ``basis_rd`` by ``lll``, ``bkz`` or ``hkz``, and carry the core along.

    ``metric`` (D, D) says what is short and what is orthogonal, for the reduction and for the figures; none
    means the identity. Raises ``ValueError`` for dependent rows, an unknown method, ``hkz`` beyond its
    reach, what is no metric of this width, or a core that is not finite.
    """
    check_finite(core_vr, "core")
    rows = basis_rd.detach().double().cpu().numpy()
    if method == "hkz" and len(rows) > HKZ_LIMIT:
        raise ValueError(
            f"hkz enumerates in {len(rows)} dimensions, and {HKZ_LIMIT} are in reach; use bkz"
        )
    measured = _measured_rows(rows, metric)
    reduced = lattice.reduce(measured, method=method)
    transform = reduced.transform
    basis = torch.from_numpy(
        reduced.basis if metric is None else transform.astype(np.float64) @ rows
    )
    inverse = _inverse(transform, measured, reduced.basis)
    core = core_vr.detach().double().cpu() @ torch.from_numpy(inverse.astype(np.float64))
    return Rebased(
        core=core.to(core_vr.dtype).to(core_vr.device),
        basis=basis.to(basis_rd.dtype).to(basis_rd.device),
        transform=transform,
        before=_facts(measured),
        after=_facts(reduced.basis),
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
