"""Tables as lattice points: near under the metric, one step in all directions, entropy coded.

At high rate no quantizer of rows does better by mean squared error than one step in coordinates that
are uncorrelated, with an entropy coder that knows each coordinate's spread; at lower rates coordinates
with less variance than the distortion get no bits at all (reverse water-filling: Cover & Thomas 2006,
section 10.3.3), and that is all the dimension reduction there is. Where such coordinates cost more to
store than they save, points are taken on the original ones, with the metric's distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np

from cllm.compress.codecs.bases import WORTH, Basis, plain_basis, rotated_basis
from cllm.compress.codecs.entropy import LARGEST, decode_integers, encode_integers
from cllm.compress.codecs.frame import Reader, as_table, pack
from cllm.compress.codecs.points import BLOCK, LATTICES, decode_points, encode_points
from cllm.compress.codecs.quantize import least_squares_scales
from cllm.compress.codecs.rate import COARSEST, TooFineError, smallest_step
from cllm.model.table_metric import as_metric, roots

BASES = ("auto", "rotated", "plain")
# What a body begins with: whether a rotation is stored, and the lattice of the points.
FORMS = ((False, "z"), (True, "z"), (True, "e8"), (True, "leech"), (False, "e8"), (False, "leech"))
_FLOAT32 = float(np.finfo(np.float32).max)
# Half of what a bit is worth by distortion: the loss rises less at equal bytes (docs/design.md).
PRICE = WORTH / 2
# Rows' steps are whole numbers of half octaves, as factors that no machine's ``pow`` decides.
_HALVES = (1.0, 1.4142135623730951)


@dataclass(frozen=True, kw_only=True)
class Lattice:
    """The lattice codec.

    Attributes:
        step: size of a cell, in the table's unit (the metric taken at determinant 1). Exactly one of
            ``step`` and ``target_bytes``.
        target_bytes: the step is the smallest found whose file is no larger.
        frequency_power: a row's step is the common one times frequency^-power, to half an octave.
        price: what a bit may cost in squared distance, in step²; 0 rounds to the nearest in the columns
            that are kept.
        precision: error of the stored rotation, in steps of a coordinate under the metric.
        basis: ``rotated`` stores the eigenbasis of the whitened table, in integers; ``plain`` keeps the
            original coordinates and stores none; ``auto`` takes the better.
        lattice: of the points: ``z``, blocks of 8 columns in ``e8`` or of 24 in ``leech``; ``auto`` takes
            the better of ``z`` and ``e8``. Blocks are found by K-best with ``beams``, points of ``z`` by
            nearest plane on a rotation and by K-best on an LLL-reduced basis (up to 256 columns, and with
            ``fpylll``) of the metric's lattice in the original coordinates, where a bit has no price.
    """

    step: float | None = None
    target_bytes: int | None = None
    frequency_power: float = 0.25
    price: float = PRICE
    precision: float = 0.02
    basis: str = "auto"
    lattice: str = "auto"
    beams: int = 8

    name = "lattice"

    def __post_init__(self) -> None:
        if (self.step is None) == (self.target_bytes is None):
            raise ValueError("give either step or target_bytes to the lattice codec")
        if self.step is not None and not 0 < self.step <= _FLOAT32:
            raise ValueError(f"the step must be positive and within float32, not {self.step}")
        if self.target_bytes is not None and self.target_bytes < 1:
            raise ValueError(f"target_bytes must be positive, not {self.target_bytes}")
        if self.basis not in BASES:
            raise ValueError(f"the basis must be one of {BASES}, not {self.basis!r}")
        if self.lattice not in ("auto", *LATTICES):
            raise ValueError(
                f"the lattice must be auto or one of {', '.join(LATTICES)}, not {self.lattice!r}"
            )
        if not 0 <= self.frequency_power <= 1 or not 0 <= self.price <= 1:
            raise ValueError("frequency_power and price lie between 0 and 1")
        if not 1e-6 <= self.precision <= 1 or self.beams < 1:
            raise ValueError("precision lies between 1e-6 and 1, and beams are at least 1")

    def encode(self, array: Any, metric: Any = None, *, frequency: Any = None) -> bytes:
        """``array`` (V, D) as bytes that ``decode`` turns into a table near it.

        ``metric`` (D, D): what errors cost (``table_metric``), none means the identity. ``frequency``
        (V,): how often each row is used; none means that all are alike. Raises ``ValueError`` for what
        is no table, metric or frequency (naming its shape), for a step too small for 30-bit integers
        and for a ``target_bytes`` out of reach; ``UserError`` without ``constriction``.
        """
        table = as_table(array)
        work = _prepare(table, metric, frequency, self.frequency_power)
        if self.step is not None:
            return pack(self.name, table.shape, _encode(self, work, self.step).body)
        assert self.target_bytes is not None
        frame = len(pack(self.name, table.shape, b""))
        spread = min(work.spread, _FLOAT32 / 2**COARSEST)
        body = smallest_step(
            lambda step: _encode(self, work, step).body, self.target_bytes - frame, spread
        )
        return pack(self.name, table.shape, body)


@dataclass(frozen=True)
class _Work:
    """A table as the quantizer sees it: ``targets`` (V, D) = (table − mean)/row step · ``root``."""

    table: np.ndarray
    targets: np.ndarray
    root: np.ndarray
    inverse: np.ndarray
    octaves: np.ndarray | None
    mean: np.ndarray

    @property
    def spread(self) -> float:
        """Root mean square of the targets; 1 for a table that is constant."""
        return float(np.sqrt((self.targets**2).mean())) or 1.0

    def rotated(self, codec: Lattice, step: float) -> Basis:
        """The basis with a rotation; rounding errors of its rows count as the metric stretches them."""
        stretch = float(np.sqrt((self.root**2).sum() / len(self.root)))
        precision = codec.precision / stretch
        return rotated_basis(self.targets, self.inverse, step, precision, codec.price)


@dataclass(frozen=True)
class _Encoded:
    body: bytes
    distortion: float
    """Σ of squared errors of the targets."""


def _prepare(table: np.ndarray, metric: Any, frequency: Any, power: float) -> _Work:
    root, inverse = roots(as_metric(metric, width=table.shape[1]))
    scale = np.exp(np.linalg.slogdet(root)[1] / len(root))
    root, inverse = root / scale, inverse * scale
    octaves = _octaves(frequency, len(table), power)
    steps = row_steps(octaves) if octaves is not None else np.ones(len(table))
    mean = table.mean(axis=0, dtype=np.float64).astype(np.float32).astype(np.float64)
    return _Work(
        table=table,
        targets=((table - mean) / steps[:, None]) @ root,
        root=root,
        inverse=inverse,
        octaves=octaves,
        mean=mean,
    )


def _octaves(frequency: Any, rows: int, power: float) -> np.ndarray | None:
    """(V,) half octaves by which each row's step differs; ``None`` where all are alike."""
    if frequency is None:
        return None
    counts = np.asarray(frequency, dtype=np.float64)
    if counts.shape != (rows,):
        raise ValueError(
            f"a frequency for each of {rows} rows is needed, not of shape {counts.shape}"
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(
            f"the frequencies of shape {counts.shape} hold NaN, infinity or less than 0"
        )
    # A row never seen counts as half a time the rarest.
    seen = counts[counts > 0]
    logs = np.log2(np.maximum(counts, seen.min() / 2)) if len(seen) else np.zeros(rows)
    octaves = np.rint(-power * len(_HALVES) * (logs - logs.mean())).astype(np.int64)
    return octaves if octaves.any() else None


def row_steps(octaves: np.ndarray) -> np.ndarray:
    """2^(octaves/2), the same on every machine."""
    return np.ldexp(np.take(_HALVES, octaves % 2), octaves // 2)


def _encode(codec: Lattice, work: _Work, step: float) -> _Encoded:
    """The best of what ``codec`` allows at one step. A way for which the step is too fine leaves the
    others; ``TooFineError`` where none is left."""
    bases = {"rotated": cache(partial(work.rotated, codec, step))}
    bases["plain"] = cache(partial(plain_basis, work.table.shape[1], step, codec.beams))
    names = [*bases] if codec.basis == "auto" else [codec.basis]
    lattices = ["z", "e8"] if codec.lattice == "auto" else [codec.lattice]
    found, refused = list[_Encoded](), list[TooFineError]()
    for name, lattice in product(names, lattices):
        try:
            basis = bases[name]()
            if codec.lattice != "auto" or lattice == "z" or len(basis.factors) >= BLOCK:
                basis = basis.of(lattice, codec.beams)
                found.append(_encode_on(work, basis, step, codec.price))
        except TooFineError as error:
            refused.append(error)
    if not found:
        raise refused[-1]
    worth = max(codec.price, WORTH) * step**2
    return min(found, key=lambda e: e.distortion + worth * 8 * len(e.body))


def _encode_on(work: _Work, basis: Basis, step: float, price: float) -> _Encoded:
    metric_rows = basis.rows @ work.root
    chosen = basis.decide(metric_rows, work.targets, price * step**2)
    if chosen.size and np.abs(chosen).max() >= LARGEST:
        raise TooFineError("this table: integers pass 30 bits")
    if basis.integers is not None and basis.lattice == "z":
        used = np.asarray(chosen.any(axis=0))
        chosen, basis, metric_rows = chosen[:, used], basis.only(used), metric_rows[used]
    scales = least_squares_scales(chosen, metric_rows, work.targets)
    factors = (basis.factors * scales).astype("<f4")
    error = work.targets - chosen @ (metric_rows * scales[:, None])
    form = FORMS.index((basis.integers is not None, basis.lattice))
    body = bytes([form, work.octaves is not None])
    body += len(factors).to_bytes(4, "little") + work.mean.astype("<f4").tobytes()
    body += factors.tobytes()
    if basis.integers is not None:
        body += encode_integers(basis.integers)
    if work.octaves is not None:
        middle = int(np.median(work.octaves))  # so that most are 0, which needs no sign
        body += middle.to_bytes(2, "little", signed=True)
        body += encode_integers((work.octaves - middle)[:, None])
    body += encode_points(basis.lattice, chosen.astype(np.int64))
    return _Encoded(body=body, distortion=float((error**2).sum()))


def decode(body: bytes, shape: tuple[int, int]) -> np.ndarray:
    """The (V, D) float32 table of ``Lattice.encode``; nothing in it depends on a library's rounding.

    Raises ``ValueError`` for bytes that are no such thing; ``UserError`` without ``constriction``.
    """
    rows, width = shape
    reader = Reader(body)
    form, has_octaves = reader.number("<B"), reader.number("<B")
    count = reader.number("<I")
    if form >= len(FORMS):
        raise ValueError(f"the table's form {form} is not known here: damaged, or of a newer cllm")
    rotated, lattice = FORMS[form]
    if has_octaves > 1 or (count > width if rotated else count != width):
        raise ValueError(f"damaged table: {count} columns of {width}")
    mean = reader.array("<f4", width).astype(np.float64)
    factors = reader.array("<f4", count).astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(factors).all()):
        raise ValueError("damaged table: its mean or factors are not finite")
    basis = decode_integers(reader, count, width) if rotated else np.eye(width)
    steps = np.ones(rows)
    if has_octaves:
        middle = reader.number("<h")
        octaves = decode_integers(reader, rows, 1)[:, 0] + middle
        if np.abs(octaves).max() > 2000:
            raise ValueError("damaged table: a row's step is out of range")
        steps = row_steps(octaves)
    chosen = decode_points(reader, lattice, rows, count)
    reader.end()
    return _assemble(chosen, basis * factors[:, None], steps, mean)


def _assemble(
    chosen: np.ndarray, basis: np.ndarray, steps: np.ndarray, mean: np.ndarray
) -> np.ndarray:
    """steps · (chosen · basis) + mean, added up in one order: a library's product would not say which.

    Beyond float32 stands its largest number.
    """
    out = np.zeros((len(chosen), basis.shape[1]))
    for column, row in zip(chosen.T.astype(np.float64), basis, strict=True):
        out += np.multiply.outer(column, row)
    out *= steps[:, None]
    out += mean
    return out.clip(-_FLOAT32, _FLOAT32).astype(np.float32)
