"""Coordinates of lattice points to words of ANS and back, under models that both sides keep alike."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm.compress.bits import Bits, packed, pop_gamma, push_gamma
from cllm.compress.codecs.entropy import LARGEST, constriction_stream
from cllm.compress.codecs.frame import Reader
from cllm.compress.coded import CLASSES, ESCAPE, SYMBOLS
from cllm.compress.lattices.residues import (
    CONTEXTS,
    COSET,
    SPACINGS,
    UNIT,
    context,
    is_even,
    ranks,
    shift_of,
    start,
    values_of,
)


class _Models:
    """Counts of symbols by model, a model for each context and class; what is seen counts from the next
    ``learn`` on, so that whole arrays are coded under one table."""

    def __init__(self) -> None:
        self._counts: dict[int, np.ndarray] = {}
        self._seen: list[tuple[int, np.ndarray]] = []

    def table(self, model: int) -> np.ndarray:
        """The counts of ``model`` as what ``constriction`` takes."""
        if model not in self._counts:
            self._counts[model] = start(model % CLASSES, model // CLASSES).copy()
        counts = self._counts[model][: 2 if model // CLASSES == COSET else None]
        return counts.astype(np.float64)

    def see(self, model: int, symbols: np.ndarray) -> bool:
        """Take note of symbols; returns whether any says that more follows."""
        found = np.bincount(symbols, minlength=SYMBOLS)
        self._seen.append((model, found))
        return bool(found[ESCAPE])

    def learn(self) -> None:
        """Count what was seen."""
        for model, found in self._seen:
            self._counts[model] += UNIT * found
        self._seen.clear()


@dataclass(frozen=True, eq=False)
class _Groups:
    """Flat entries by model: the order that brings those of one together, the models that occur, by their
    numbers, and how many entries each has."""

    order: np.ndarray
    models: np.ndarray
    counts: np.ndarray

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Each model, and where its entries are in the order."""
        ends = np.cumsum(self.counts)
        for model, count, end in zip(
            self.models.tolist(), self.counts.tolist(), ends.tolist(), strict=True
        ):
            yield model, slice(end - count, end)


def _groups(models: np.ndarray) -> _Groups:
    counts = np.bincount(models)
    present = np.flatnonzero(counts)
    # Few models: their places fit a byte, which is sorted in one pass.
    place = np.zeros(len(counts), dtype=np.uint8 if len(present) <= 256 else np.uint16)
    place[present] = np.arange(len(present))
    return _Groups(np.argsort(place[models], kind="stable"), present, counts[present])


_PLACES = {
    s: np.array([CLASSES * context(s, min(r, s - r)) for r in range(s)], dtype=np.uint16)
    for s in SPACINGS
}
"""Spacing to the first model of each residue's context."""
_FOLDS = {s: np.array([-1 if 2 * r > s else 1 for r in range(s)], dtype=np.int32) for s in SPACINGS}
"""Spacing to the sign by which each residue class is folded."""
_EVEN = np.array([is_even(s, r) for s, r in CONTEXTS])
_VALUES = np.array([values_of(np.arange(SYMBOLS), s, r) for s, r in CONTEXTS], dtype=np.int32)
"""(contexts, ranks): what ``values_of`` makes of small ranks."""


def _folded(
    spacing: int, residues: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Models (uint16) and the sign by which each residue class is folded, both flat; no signs where no
    class is."""
    flat = residues.ravel()
    models = _PLACES[spacing][flat] + classes.ravel()
    return models, _FOLDS[spacing][flat] if spacing > 2 else None


def _shift(model: int) -> int:
    """Low bits of a model's ranks, stored as they are."""
    return shift_of(model % CLASSES, model // CLASSES)


class WriteStream:
    """Takes coordinates in."""

    def __init__(self) -> None:
        self._stream, self._models = constriction_stream(), _Models()
        self._planned: list[tuple[np.ndarray, np.ndarray]] = []
        self._signs: list[np.ndarray] = []
        self._lows: list[np.ndarray] = []
        self.learn = self._models.learn

    def cosets(self, classes: np.ndarray, known: np.ndarray | None) -> np.ndarray:
        """Write parities."""
        assert known is not None
        flat, groups = known.ravel(), _groups(COSET * CLASSES + classes.ravel().astype(np.uint16))
        for model, part in groups:
            self._push(model, flat[groups.order[part]])
        return known

    def values(
        self, spacing: int, residues: np.ndarray, classes: np.ndarray, known: np.ndarray | None
    ) -> np.ndarray:
        """Write integers."""
        assert known is not None
        models, fold = _folded(spacing, residues, classes)
        flat = known.ravel() if fold is None else known.ravel() * fold
        groups = _groups(models)
        for model, part in groups:
            here, shift = flat[groups.order[part]], _shift(model)
            s, r = CONTEXTS[model // CLASSES]
            rank = ranks(here, s, r)
            self._push(model, rank >> shift)
            if is_even(s, r):
                self._signs.append(here[here != 0] < 0)
            if shift:
                low = rank & ((1 << shift) - 1)
                self._lows.append((low[:, None] >> np.arange(shift) & 1).astype(bool).ravel())
        return known

    def _push(self, model: int, symbols: np.ndarray) -> None:
        self._planned.append((symbols, self._models.table(model)))
        self._models.see(model, np.minimum(symbols, ESCAPE))

    def bytes(self) -> bytes:
        """All that was written."""
        coder = self._stream.stack.AnsCoder()
        family = self._stream.model.Categorical
        # The stack gives back what went in last.
        for high, table in reversed(self._planned):
            for excess in (high[high >= ESCAPE] - ESCAPE)[::-1]:
                push_gamma(self._stream, coder, int(excess) + 1)
            symbols = np.minimum(high, ESCAPE).astype(np.int32)
            coder.encode_reverse(symbols, family(table, perfect=False, lazy=False))
        words = np.asarray(coder.get_compressed(), dtype="<u4").tobytes()
        sign, low = packed(self._signs), packed(self._lows)
        return struct.pack("<III", len(words), len(sign), len(low)) + words + sign + low


class ReadStream:
    """Gives coordinates back. Raises ``ValueError`` for what no ``WriteStream`` wrote."""

    def __init__(self, reader: Reader) -> None:
        self._stream, self._models = constriction_stream(), _Models()
        sizes = [reader.number("<I") for _ in range(3)]
        words, sign, low = (np.frombuffer(reader.take(size), dtype=np.uint8) for size in sizes)
        if len(words) % 4 or (len(words) and not words[-4:].any()):
            raise ValueError("damaged matrix: the entropy-coded part is cut")
        self._coder: Any = self._stream.stack.AnsCoder(words.view("<u4").astype(np.uint32))
        self._signs, self._lows = Bits(sign), Bits(low)
        self.learn = self._models.learn

    def cosets(self, classes: np.ndarray, known: np.ndarray | None) -> np.ndarray:
        """The next parities."""
        found = np.empty(classes.size, dtype=np.int32)
        groups = _groups(COSET * CLASSES + classes.ravel().astype(np.uint16))
        for model, part in groups:
            found[groups.order[part]], _ = self._pop(model, part.stop - part.start)
        return found.reshape(classes.shape)

    def values(
        self, spacing: int, residues: np.ndarray, classes: np.ndarray, known: np.ndarray | None
    ) -> np.ndarray:
        """The next integers."""
        models, fold = _folded(spacing, residues, classes)
        groups = _groups(models)
        here = np.empty(classes.size, dtype=np.int32)
        for model, part in groups:
            here[part] = self._ranks(model, part.stop - part.start)
        # What follows is the same for all models, and done at once.
        places = groups.models // CLASSES
        if here.max(initial=0) < SYMBOLS:
            here += np.repeat((places * SYMBOLS).astype(np.int32), groups.counts)
            here = np.take(_VALUES.ravel(), here, mode="clip")  # faster, and in range
        else:
            for place, (_, part) in zip(places.tolist(), groups, strict=True):
                here[part] = values_of(here[part], *CONTEXTS[place])
        signed = here != 0
        if not _EVEN[places].all():
            signed &= np.repeat(_EVEN[places], groups.counts)
        there = np.flatnonzero(signed)
        negative = there[self._signs.take(len(there)).view(bool)]
        here[negative] *= -1
        found = np.empty_like(here)
        found[groups.order] = here
        if fold is not None:
            found *= fold
        return found.reshape(classes.shape)

    def _pop(self, model: int, count: int) -> tuple[np.ndarray, bool]:
        """Symbols, and whether any says that more follows."""
        table = self._models.table(model)
        family = self._stream.model.Categorical(table, perfect=False, lazy=False)
        symbols: np.ndarray = self._coder.decode(family, count)
        return symbols, self._models.see(model, symbols)

    def _ranks(self, model: int, count: int) -> np.ndarray:
        (found, more), shift = self._pop(model, count), _shift(model)
        if not shift and not more:
            return found
        wide = found.astype(np.int64)
        for i in np.flatnonzero(wide == ESCAPE):
            wide[i] += pop_gamma(self._stream, self._coder) - 1
        if wide.max(initial=0) >= LARGEST >> shift:
            raise ValueError("damaged matrix: an integer is out of range")
        if shift:
            low = self._lows.take(count * shift).reshape(-1, shift).astype(np.int64)
            wide = wide << shift | low @ (1 << np.arange(shift))
        return wide

    def end(self) -> None:
        """Refuse what is left over."""
        left = (self._signs.left(), self._lows.left())
        if not self._coder.is_empty() or max(left) >= 8:
            raise ValueError("damaged matrix: the entropy-coded part has more than its integers")
