"""What a basis and a target must be, checked once at the door: every refusal names the shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def as_basis(B: Any, name: str = "basis") -> np.ndarray:
    """``B`` as a finite, non-empty (n, d) NumPy matrix: float, int64, or object holding Python ints.

    Integers beyond int64 come as lists of Python ints or object arrays. Rank is not checked here.

    Raises:
        ValueError: not a matrix, empty, not numbers, or not finite; the message has the shape.
    """
    if isinstance(B, torch.Tensor):
        B = B.detach().cpu()
        # NumPy has no bfloat16.
        B = (B.double() if B.is_floating_point() else B).numpy()
    try:
        array = np.asarray(B)
    except ValueError as error:
        raise ValueError(f"{name}: rows of different lengths do not make a matrix") from error
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be a non-empty (n, d) matrix, got shape {array.shape}")
    if array.dtype in (np.float64, np.uint64) and not isinstance(B, np.ndarray):
        # NumPy makes floats of a list that mixes int64 with larger integers.
        exact = np.array(B, dtype=object)
        if all(isinstance(x, (int, np.integer)) for x in exact.flat):
            array = exact
    if array.dtype == object:
        return _exact_objects(array, name)
    if array.dtype.kind == "u":
        array = array.astype(object) if array.dtype == np.uint64 else array.astype(np.int64)
        return array
    if array.dtype.kind == "i":
        return array.astype(np.int64)
    if array.dtype.kind != "f":
        raise ValueError(f"{name} of shape {array.shape} must hold real numbers, not {array.dtype}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise ValueError(f"{name} of shape {array.shape} has NaN or infinity, first in row {row}")
    return array


def _exact_objects(array: np.ndarray, name: str) -> np.ndarray:
    if not all(isinstance(x, (int, np.integer)) and not isinstance(x, bool) for x in array.flat):
        raise ValueError(f"{name} of shape {array.shape} and dtype object must hold integers only")
    return np.vectorize(int, otypes=[object])(array)


def as_real_basis(B: Any, name: str = "basis") -> np.ndarray:
    """``as_basis`` in float64.

    Raises:
        ValueError: also where an integer is too large for float64.
    """
    array = as_basis(B, name)
    try:
        return array.astype(np.float64)
    except OverflowError as error:
        raise ValueError(
            f"{name} of shape {array.shape} has integers beyond float64: reduce it first"
        ) from error


def as_targets(targets: Any, dimension: int, name: str = "targets") -> torch.Tensor:
    """``targets`` as a finite (m, dimension) float32 or float64 tensor; one vector becomes m = 1.

    Memory is shared with the input where its dtype is already float32 or float64. Integers and half
    precision become float64 and float32.

    Raises:
        ValueError: wrong last dimension, more than two dimensions, not real numbers, NaN or infinity, not
            in the CPU's memory.
    """
    return measured_targets(targets, dimension, name)[0]


def measured_targets(targets: Any, dimension: int, name: str) -> tuple[torch.Tensor, float]:
    """``as_targets``, and the largest size of a coordinate, which the check found."""
    if not isinstance(targets, torch.Tensor):
        try:
            array = np.asarray(targets)
        except ValueError as error:
            raise ValueError(f"{name}: rows of different lengths do not make a matrix") from error
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{name} of shape {array.shape} must hold real numbers")
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            # torch has no long double.
            array = array.astype(np.float64)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        if not array.flags.writeable or not array.flags.c_contiguous:
            array = array.copy()
        targets = torch.from_numpy(array)
    targets = targets.detach()
    if targets.device.type != "cpu":
        raise ValueError(f"{name} lies on {targets.device}: move it to the CPU (.cpu())")
    if targets.ndim not in (1, 2) or targets.shape[-1] != dimension:
        raise ValueError(
            f"{name} must have shape (m, {dimension}) or ({dimension},), got {tuple(targets.shape)}"
        )
    if targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"{name} of shape {tuple(targets.shape)} must hold real numbers")
    if targets.dtype not in (torch.float32, torch.float64):
        targets = targets.to(torch.float32 if targets.is_floating_point() else torch.float64)
    size = magnitude(targets)
    if not math.isfinite(size):
        raise ValueError(f"{name} of shape {tuple(targets.shape)} has NaN or infinity")
    return targets.reshape(-1, dimension), size


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a result. NumPy asks the system for huge pages and torch does not: on a result of
    many megabytes the page faults cost more than a fast decoder."""
    numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
    return torch.from_numpy(np.empty(tuple(shape), dtype=numpy_dtype))


def magnitude(x: torch.Tensor) -> float:
    """max |x|, or NaN or infinity where x has one; one pass, and no copy of the size of x."""
    if x.numel() == 0:
        return 0.0
    # Of columns that lie in memory as rows torch would make a copy first.
    low, high = torch.aminmax(x.T if x.ndim == 2 and not x.is_contiguous() else x)
    return float(torch.maximum(-low, high))


def back(result: torch.Tensor, like: Any) -> Any:
    """``result`` in the kind of ``like``: a tensor for a tensor, otherwise a NumPy array."""
    return result if isinstance(like, torch.Tensor) else result.numpy()


def positive_int(value: Any, name: str) -> int:
    """``value`` as an int of at least 1, or ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)
