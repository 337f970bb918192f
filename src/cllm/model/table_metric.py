"""What an error in a table costs: the metric M, and the coordinates in which it is the identity."""

from __future__ import annotations

from typing import Any

import numpy as np


def table_metric(moment: Any, *, head: bool = True, look_up: bool = True) -> np.ndarray:
    """M (D, D) such that a row's error e costs about e·M·eᵀ, from E[hhᵀ] (D, D) of final hidden states.

    The output head multiplies rows by h, so that an error costs E[(e·h)²] = e·E[hhᵀ]·eᵀ there. To the
    look-up all directions are taken to be alike. A tied table does both jobs: the mean of the two at
    equal trace, ½E[hhᵀ]·(D / tr) + ½I. ``head`` or ``look_up`` alone is for an untied table.

    Raises ``ValueError`` for a moment that is not square, symmetric and finite with a positive trace.
    """
    moment = as_metric(moment, "moment")
    width = len(moment)
    trace = float(np.trace(moment))
    if not trace > 0:
        raise ValueError(f"the moment of shape {moment.shape} has no positive trace")
    if not (head or look_up):
        raise ValueError("a table is for the head, for the look-up, or for both")
    parts = []
    if head:
        parts.append(moment * (width / trace))
    if look_up:
        parts.append(np.eye(width))
    return np.mean(parts, axis=0)


def as_metric(metric: Any, name: str = "metric", width: int | None = None) -> np.ndarray:
    """``metric`` as symmetric float64 (D, D); ``None`` with a ``width`` means the identity.

    Raises ``ValueError`` naming the shape of what is no metric.
    """
    if metric is None:
        assert width is not None
        return np.eye(width)
    array = np.asarray(metric, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise ValueError(f"the {name} must be square, not of shape {array.shape}")
    if width is not None and len(array) != width:
        raise ValueError(
            f"the {name} of shape {array.shape} does not fit a table of {width} columns"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"the {name} of shape {array.shape} holds NaN or infinity")
    if not np.allclose(array, array.T, rtol=1e-6, atol=1e-9 * np.abs(array).max()):
        raise ValueError(f"the {name} of shape {array.shape} is not symmetric")
    return (array + array.T) / 2


def roots(metric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M^½ and M^-½, symmetric. ``ValueError`` for eigenvalues that are negative.

    Directions without weight get a millionth of the mean's, so that there is an inverse; what is
    decided in them costs nothing anyway.
    """
    values, vectors = np.linalg.eigh(metric)
    if values[-1] <= 0 or values[0] < -1e-6 * values[-1]:
        raise ValueError(
            f"the metric of shape {metric.shape} has the eigenvalue {values[0]:.3g}: not positive"
        )
    values = np.maximum(values, 1e-6 * values.mean())
    root = np.sqrt(values)
    return vectors * root @ vectors.T, vectors / root @ vectors.T
