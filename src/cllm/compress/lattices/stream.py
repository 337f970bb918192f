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

    def see(self, model: int, symbols: np.ndarray) -> None:
        """Take note of symbols."""
        self._seen.append((model, np.bincount(symbols, minlength=SYMBOLS)))

    def learn(self) -> None:
        """Count what was seen."""
        for model, found in self._seen:
            self._counts[model] += UNIT * found
        self._seen.clear()


@dataclass(frozen=True)
class _Group:
    """Flat entries of one model: ``where`` they are, the model, and what their values are folded from."""

    where: np.ndarray
    model: int

    @property
    def shift(self) -> int:
        """Low bits stored as they are."""
        return shift_of(self.model % CLASSES, self.model // CLASSES)


def _groups(models: np.ndarray) -> Iterator[_Group]:
    """Entries by model, in the order of the models' numbers."""
    order = np.argsort(models, kind="stable")
    present, begins = np.unique(models[order], return_index=True)
    for model, where in zip(present.tolist(), np.split(order, begins[1:]), strict=True):
        yield _Group(where, model)


_PLACES = {s: np.array([context(s, min(r, s - r)) for r in range(s)]) for s in (1, 2, 4, 8)}
"""Spacing to the context of each residue."""


def _folded(
    spacing: int, residues: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Models (uint16), and the sign by which each residue class is folded, both flat."""
    flat = residues.ravel()
    models = _PLACES[spacing][flat] * CLASSES + classes.ravel()
    return models.astype(np.uint16), np.where(2 * flat > spacing, -1, 1)


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
        flat = known.ravel()
        for group in _groups(COSET * CLASSES + classes.ravel().astype(np.uint16)):
            self._push(group.model, flat[group.where])
        return known

    def values(
        self, spacing: int, residues: np.ndarray, classes: np.ndarray, known: np.ndarray | None
    ) -> np.ndarray:
        """Write integers."""
        assert known is not None
        models, fold = _folded(spacing, residues, classes)
        flat = known.ravel() * fold
        for group in _groups(models):
            here, shift = flat[group.where], group.shift
            s, r = CONTEXTS[group.model // CLASSES]
            rank = ranks(here, s, r)
            self._push(group.model, rank >> shift)
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
        found = np.empty(classes.size, dtype=np.int64)
        for group in _groups(COSET * CLASSES + classes.ravel().astype(np.uint16)):
            found[group.where] = self._pop(group)
        return found.reshape(classes.shape)

    def values(
        self, spacing: int, residues: np.ndarray, classes: np.ndarray, known: np.ndarray | None
    ) -> np.ndarray:
        """The next integers."""
        models, fold = _folded(spacing, residues, classes)
        found = np.empty(classes.size, dtype=np.int64)
        for group in _groups(models):
            s, r = CONTEXTS[group.model // CLASSES]
            here = values_of(self._ranks(group), s, r)
            if is_even(s, r):
                there = np.flatnonzero(here)
                negative = there[self._signs.take(len(there)).view(bool)]
                here[negative] = -here[negative]
            found[group.where] = here
        return (found * fold).reshape(classes.shape)

    def _pop(self, group: _Group) -> np.ndarray:
        table = self._models.table(group.model)
        family = self._stream.model.Categorical(table, perfect=False, lazy=False)
        symbols: np.ndarray = self._coder.decode(family, len(group.where))
        self._models.see(group.model, symbols)
        return symbols

    def _ranks(self, group: _Group) -> np.ndarray:
        found, shift = self._pop(group).astype(np.int64), group.shift
        for i in np.flatnonzero(found == ESCAPE):
            found[i] += pop_gamma(self._stream, self._coder) - 1
        if found.max(initial=0) >= LARGEST >> shift:
            raise ValueError("damaged matrix: an integer is out of range")
        if shift:
            low = self._lows.take(len(found) * shift).reshape(-1, shift).astype(np.int64)
            found = found << shift | low @ (1 << np.arange(shift))
        return found

    def end(self) -> None:
        """Refuse what is left over."""
        left = (self._signs.left(), self._lows.left())
        if not self._coder.is_empty() or max(left) >= 8:
            raise ValueError("damaged matrix: the entropy-coded part has more than its integers")
