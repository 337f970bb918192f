"""The closest vector problem for many targets at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from cllm.lattice.babai import Frame, NearestPlane, frame, nearest_plane, rounding
from cllm.lattice.beam import Tree, beam_search
from cllm.lattice.check import as_real_basis, as_targets, back, empty, magnitude, positive_int
from cllm.lattice.threads import for_each

METHODS = ("rounding", "nearest-plane", "k-best", "exact")

# Targets decoded before what is said of them.
CHUNK = 4096
BEAM_CHUNK = 1040
# Beams that give exact enumeration its first radius.
START_BEAMS = 16
# Share of ½·min‖b*_i‖ that the rounding error of an enumerated answer may reach.
SAFE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Closest:
    """Lattice points for targets (m, d); arrays are of the targets' kind (NumPy or torch).

    Attributes:
        coefficients: (m, n) integers, int64 for float64 targets and int32 for float32.
        points: (m, d) = coefficients @ B, in the targets' dtype.
        distances: (m,) Euclidean, in the basis's unit.
        is_certified: (m,) True where the point is proved to be closest. Without enumeration, because
            the distance with a bound of its rounding error is below ½·min‖b*_i‖ ≤ λ1/2: then every
            other lattice point, in a box or out of it, is farther. By ``exact``, because the search
            (of the box, where there is one) found no nearer point, up to that rounding error; others
            may be as near. It is False where the error is not far below ½·min‖b*_i‖.
    """

    coefficients: Any
    points: Any
    distances: Any
    is_certified: Any


def closest(
    B: Any,
    targets: Any,
    method: str = "nearest-plane",
    *,
    K: int = 16,
    children: int = 2,
    bounds: tuple[Any, Any] | None = None,
    kernel: bool | None = None,
) -> Closest:
    """Lattice points close to the targets.

    Args:
        B: (n, d) basis, rows are vectors. Only ``exact`` reduces it by itself: reduce first.
        targets: (m, d) or (d,), float32 or float64 (others are converted); the arithmetic on targets
            is in their dtype.
        method: ``rounding`` and ``nearest-plane`` (Babai 1986); ``k-best`` with ``K`` beams of
            ``children`` integers each, never worse than nearest-plane and equal to it at K = 1;
            ``exact`` by enumeration (Schnorr & Euchner 1994), for small dimension.
        bounds: ``(low, high)`` integers, scalars or (n,), that the coefficients on B must keep to.
            Every method then decides inside the box.
        kernel: k-best by a kernel that is compiled once for the machine and kept in the user's cache, or
            (False) by passes of torch, several times slower. None takes the kernel where there is a C++
            compiler, and warns where there is none; True insists on it.

    Chunks of the targets are shared out among torch's number of threads (``torch.set_num_threads``),
    but for ``exact``.

    Raises:
        ValueError: malformed or rank-deficient basis, malformed targets, empty box, coefficients
            beyond what the dtype holds exactly, a dimension out of reach of ``exact``, or no compiler for
            the kernel that was insisted on.
    """
    basis = as_real_basis(B)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    K, children = positive_int(K, "K"), positive_int(children, "children")
    T = as_targets(targets, basis.shape[1])
    box = _box(bounds, len(basis))
    fr = frame(basis, T.dtype, box)
    decode: Callable[[torch.Tensor], torch.Tensor]
    # A chunk is decoded, and everything said of it while it is in cache; the pages of a result are
    # touched once.
    size = CHUNK
    if method == "rounding":
        decode = partial(rounding, fr)
    elif method == "nearest-plane" or (method == "k-best" and K == 1):
        decode, size = NearestPlane.of_each_thread(fr), NearestPlane.chunk_of(len(basis))
    elif method == "k-best":
        size = BEAM_CHUNK

        def decode(part: torch.Tensor) -> torch.Tensor:
            return _better(
                fr, part, nearest_plane(fr, part), _k_best(fr, part, K, children, kernel)
            )
    else:
        decode, size = partial(_exact, basis, box), max(1, len(T))
    answer = _Answer(fr, T, exact=method == "exact")

    def settle(start: int) -> None:
        part = slice(start, start + size)
        answer.put(part, decode(T[part]))

    for_each(settle, range(0, len(T), size))
    return Closest(
        coefficients=back(answer.coefficients, targets),
        points=back(answer.points, targets),
        distances=back(answer.distances, targets),
        is_certified=back(answer.is_certified, targets),
    )


class _Answer:
    """What is said of the coefficients, a part of the targets at a time."""

    def __init__(self, fr: Frame, T: torch.Tensor, exact: bool) -> None:
        self.fr, self.T, self.exact = fr, T, exact
        m, (n, d) = len(T), fr.basis.shape
        self.coefficients = empty((m, n), torch.int32 if T.dtype == torch.float32 else torch.int64)
        self.points = empty((m, d), T.dtype)
        self.distances = T.new_empty(m)
        self.is_certified = torch.empty(m, dtype=torch.bool)
        self.half = 0.5 * float(torch.diagonal(fr.L).min())

    def put(self, part: slice, X: torch.Tensor) -> None:
        """Coefficients X (m, n) of the targets of ``part``; ``ValueError`` where they overflow."""
        T = self.T[part]
        points = torch.mm(X, self.fr.basis, out=self.points[part])
        distances = torch.linalg.vector_norm(T - points, dim=1)
        limit = 2.0 ** (24 if T.dtype == torch.float32 else 53)
        # Not "beyond the limit": NaN must be refused too.
        if not (magnitude(X) < limit and bool(torch.isfinite(distances).all())):
            raise ValueError(
                f"coefficients of targets of shape {tuple(self.T.shape)} are beyond the integers that"
                f" {T.dtype} holds exactly: reduce the basis, bring targets nearer, or use float64"
            )
        np.copyto(self.coefficients[part].numpy(), X.numpy(), casting="unsafe")
        self.distances[part] = distances
        self.is_certified[part] = self._certified(T, X, distances)

    def _certified(self, T: torch.Tensor, X: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        if self.exact:
            return _rounding_error(self.fr, T, X) < SAFE * self.half
        # What is too far without an error needs no bound of it: of random targets nearly all.
        certified = distances.double() < self.half
        near = torch.nonzero(certified).view(-1)
        if len(near):
            error = _rounding_error(self.fr, T[near], X[near])
            certified[near] = distances[near].double() + error < self.half
        return certified


def _rounding_error(fr: Frame, T: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """A bound (m,) float64 of what rounding moved each distance by.

    Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1: an inner product of
    length n errs by at most n·u·Σ|x||b| to first order; the basis's own rounding, the difference and
    the norm add a few u more. The norm of these bounds over the d coordinates bounds the distance's.
    """
    unit = float(torch.finfo(T.dtype).eps)
    n, d = fr.basis.shape
    size = torch.linalg.vector_norm(T, dim=1).double()
    # ‖|X||B|‖ ≤ Σ|x_i|‖b_i‖: one pass where the product would double the work.
    size += (X.abs() @ torch.linalg.vector_norm(fr.basis, dim=1)).double()
    return (n + d + 8) * unit * size


def _box(bounds: tuple[Any, Any] | None, n: int) -> tuple[np.ndarray, np.ndarray] | None:
    if bounds is None:
        return None
    try:
        low, high = (np.broadcast_to(np.asarray(b), (n,)).astype(np.float64) for b in bounds)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"bounds must be two scalars or arrays of shape ({n},)") from error
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(f"bounds of shape ({n},) must be finite")
    if (low != np.rint(low)).any() or (high != np.rint(high)).any():
        raise ValueError(f"bounds of shape ({n},) must be integers")
    if (low > high).any():
        row = int(np.flatnonzero(low > high)[0])
        raise ValueError(f"bounds of shape ({n},) leave an empty box in row {row}")
    return low, high


def _k_best(
    fr: Frame, targets: torch.Tensor, K: int, children: int, kernel: bool | None = None
) -> torch.Tensor:
    """The best of K beams: coefficients (m, n). It may have lost Babai's path."""
    diagonal = torch.diagonal(fr.L)
    box = [None if b is None else b.to(fr.L.dtype) for b in (fr.low, fr.high)]
    tree = Tree(
        opened=targets @ (fr.Q / diagonal[:, None]).T,
        effects=fr.L / diagonal,
        squares=diagonal**2,
        low=box[0],
        high=box[1],
    )
    return beam_search(tree, K, children, kernel=kernel)


def _better(fr: Frame, T: torch.Tensor, X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """Of two coefficient vectors for every target the one whose point is nearer."""
    first = torch.linalg.vector_norm(T - X @ fr.basis, dim=1)
    second = torch.linalg.vector_norm(T - Y @ fr.basis, dim=1)
    return torch.where((second < first)[:, None], Y, X)


def _exact(
    basis: np.ndarray, box: tuple[np.ndarray, np.ndarray] | None, T: torch.Tensor
) -> torch.Tensor:
    wide = T.to(torch.float64)
    if box is not None:
        from cllm.lattice.boxed import boxed_closest

        fr = frame(basis, torch.float64, box)
        start = _better(fr, wide, nearest_plane(fr, wide), _k_best(fr, wide, START_BEAMS, 2))
        L, y = fr.L.numpy(), (wide @ fr.Q.T).numpy()
        return torch.from_numpy(boxed_closest(L, y, *box, start.numpy())).to(T.dtype)
    return _enumerate(basis, wide).to(T.dtype)


def _enumerate(basis: np.ndarray, T: torch.Tensor) -> torch.Tensor:
    from cllm.lattice.enumeration import Enumerator

    search = Enumerator(basis)
    fr = frame(search.basis, torch.float64, None)
    start = _better(fr, T, nearest_plane(fr, T), _k_best(fr, T, START_BEAMS, 2))
    distances = torch.linalg.vector_norm(T - start @ fr.basis, dim=1)
    X = start.numpy()
    for i in torch.nonzero(distances >= 0.5 * float(torch.diagonal(fr.L).min())).ravel().tolist():
        X[i] = search.closest(T[i].numpy(), X[i])
    return torch.from_numpy(X @ search.transform.astype(np.float64))
