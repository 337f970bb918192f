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
        self.learning = True

    def table(self, model: int) -> np.ndarray:
        """The counts of ``model`` as what ``constriction`` takes."""
        if model not in self._counts:
            self._counts[model] = start(model % CLASSES, model // CLASSES).copy()
        counts = self._counts[model][: 2 if model // CLASSES == COSET else None]
        return counts.astype(np.float64)

    def see(self, model: int, symbols: np.ndarray) -> None:
        """Take note of symbols."""
        if self.learning:
            self._seen.append((model, np.bincount(symbols, minlength=SYMBOLS)))

    def stop(self) -> None:
        """Learn no more: nothing that is seen from now on will be asked for."""
        self.learning = False

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


def _groups(first: int, contexts: np.ndarray, classes: np.ndarray) -> _Groups:
    """Entries by model: ``contexts`` count from the context ``first`` on, and broadcast to ``classes``."""
    low, kinds = int(classes.min(initial=CLASSES)), int(contexts.max(initial=0)) + 1
    width = int(classes.max(initial=0)) - low + 1
    # Few models: their places fit a byte, which is sorted in one pass.
    kind = np.dtype(np.uint8 if kinds * width <= 256 else np.uint16)
    own = classes.astype(kind)
    own -= kind.type(low)
    places = (contexts.astype(kind) * kind.type(width) + own).ravel()
    counts = np.bincount(places)
    present = np.flatnonzero(counts)
    models = CLASSES * (first + present // width) + present % width + low
    return _Groups(np.argsort(places, kind="stable"), models, counts[present])


_SMALL = [values_of(np.arange(SYMBOLS, dtype=np.int32), s, r) for s, r in CONTEXTS]
"""By context: what ``values_of`` makes of small ranks."""
_FIRST = {s: context(s, 0) for s in SPACINGS}
"""Spacing to the context of its residue 0; those of the others follow."""


def _folded(spacing: int, residues: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Residues folded onto their mirror images, and the sign of the fold (``None``: all +1)."""
    if spacing <= 2:
        return residues, None
    mirrored = np.uint8(spacing) - residues
    return np.minimum(residues, mirrored), np.where(residues > mirrored, np.int32(-1), np.int32(1))


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
        self.learn, self.stop = self._models.learn, self._models.stop

    def cosets(self, classes: np.ndarray, known: np.ndarray | None) -> np.ndarray:
        """Write parities."""
        assert known is not None
        flat, groups = known.ravel(), _groups(COSET, np.zeros(1, dtype=np.uint8), classes)
        for model, part in groups:
            self._push(model, flat[groups.order[part]])
        return known

    def values(
        self, spacing: int, residues: np.ndarray, classes: np.ndarray, known: np.ndarray | None
    ) -> np.ndarray:
        """Write integers."""
        assert known is not None
        folded, fold = _folded(spacing, residues)
        flat = (known if fold is None else known * fold).ravel()
        groups = _groups(_FIRST[spacing], folded, classes)
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
        self.learn, self.stop = self._models.learn, self._models.stop

    def cosets(self, classes: np.ndarray, known: np.ndarray | None) -> np.ndarray:
        """The next parities."""
        found = np.empty(classes.size, dtype=np.int32)
        groups = _groups(COSET, np.zeros(1, dtype=np.uint8), classes)
        for model, part in groups:
            found[groups.order[part]] = self._pop(model, part.stop - part.start)
        return found.reshape(classes.shape)

    def values(
        self, spacing: int, residues: np.ndarray, classes: np.ndarray, known: np.ndarray | None
    ) -> np.ndarray:
        """The next integers."""
        folded, fold = _folded(spacing, residues)
        groups = _groups(_FIRST[spacing], folded, classes)
        here = np.empty(classes.size, dtype=np.int32)
        for model, part in groups:
            here[part] = self._integers(model, part.stop - part.start)
        flat = np.empty_like(here)
        flat[groups.order] = here
        found = flat.reshape(classes.shape)
        if fold is not None:
            found *= fold
        return found

    def _integers(self, model: int, count: int) -> np.ndarray:
        """The next integers of a model, not yet unfolded."""
        (spacing, residue), found = CONTEXTS[model // CLASSES], self._ranks(model, count)
        if not is_even(spacing, residue):
            if found.dtype == np.int32:  # below SYMBOLS
                return np.take(_SMALL[model // CLASSES], found, mode="clip")  # faster, and in range
            return values_of(found, spacing, residue)
        if spacing > 1:
            found *= spacing
            found += residue
        if residue:  # none of them is 0
            signs = self._signs.take(count).astype(found.dtype)
            signs *= -2
            signs += 1
            found *= signs
        else:
            there = np.flatnonzero(found)
            negative = there[self._signs.take(len(there)).view(bool)]
            found[negative] = -found[negative]
        return found

    def _pop(self, model: int, count: int) -> np.ndarray:
        """Symbols (count,) int32."""
        table = self._models.table(model)
        family = self._stream.model.Categorical(table, perfect=False, lazy=False)
        symbols: np.ndarray = self._coder.decode(family, count)
        self._models.see(model, symbols)
        return symbols

    def _ranks(self, model: int, count: int) -> np.ndarray:
        found, shift = self._pop(model, count), _shift(model)
        more = np.maximum.reduce(found) == ESCAPE  # `max` has a wrapper, which is dear for few
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
