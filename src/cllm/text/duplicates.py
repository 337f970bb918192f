"""Near-duplicates of held-out text in the training text: MinHash with locality-sensitive hashing.

Broder 1997 ("On the resemblance and containment of documents") for MinHash; Indyk & Motwani 1998 for
the banding. Two units are near-duplicates if the Jaccard index of their five-word shingles is at
least 0.8; candidates from the hash tables are verified exactly, so none is reported by accident; of
pairs at just 0.8 the bands miss (1 - 0.8⁴)¹² = 0.2%.

A unit is a document, or, in long documents and in corpora split by blocks, a group of some 200 words
whose edges the words themselves decide (content-defined chunking, Muthitacharoen et al. 2001), so that
a repeated passage falls into the same units wherever it stands.

``drop`` takes the repeats out of *training*: validation and test keep the very text that they have
under ``report``, so that bits per byte of both runs compare, and stay a fair sample of the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cllm.text.hashing import derive, mix64
from cllm.text.pieces import pieces
from cllm.text.report import DuplicateReport
from cllm.text.shingles import WIDTH, jaccard, shingles, words
from cllm.text.splits import Splits, segment_bytes
from cllm.text.spool import Spool

THRESHOLD = 0.8
BANDS, ROWS = 12, 4
MOST_UNITS = 200_000
"""Held-out units looked for; a larger held-out part is sampled, which bounds memory at some 80 MB."""
WHOLE = 1 << 16
"""Bytes up to which a document is one unit."""
_CHUNK = 1 << 20
_SHORTEST, _LONGEST, _EDGE = 64, 1024, 127  # words of a group; one word in 128 may end it
_EXAMPLES = 5
_ALIKE = 4  # held-out units of one band key that are tried


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Units of up to about a megabyte: ``ranges`` (n, 3) document, start, end; the hashes of all their
    words in one array, unit i having ``hashes[bounds[i]:bounds[i + 1]]``."""

    ranges: np.ndarray
    hashes: np.ndarray
    bounds: np.ndarray

    def shingles(self, unit: int) -> np.ndarray:
        return shingles(self.hashes[self.bounds[unit] : self.bounds[unit + 1]])


def remove_duplicates(
    spool: Spool,
    splits: Splits,
    action: Literal["report", "drop", "off"],
    seed: int,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Splits, DuplicateReport]:
    """Find near-duplicates of validation and test in training; the splits to use, and what was found.

    ``drop`` removes them from training, ``report`` leaves the splits as they are, ``off`` does not
    look.
    """
    held_out = np.concatenate([splits.validation, splits.test])
    if action == "off" or not len(held_out):
        return splits, DuplicateReport(action)
    ranges, minima = _signatures_of(spool, held_out, splits.method, seed)
    if not len(ranges):
        return splits, DuplicateReport(action)
    index = _Index(spool, ranges, minima)
    doubled = list[np.ndarray]()
    done, total = 0, segment_bytes(splits.train)
    for chunk in _chunks(spool, splits.train, splits.method):
        if len(repeats := index.match(chunk, everything=action == "drop")):
            doubled.append(chunk.ranges[repeats])
        done += segment_bytes(chunk.ranges)
        progress(min(1.0, done / total))
    dropped = (
        np.concatenate(doubled) if doubled and action == "drop" else np.zeros((0, 3), np.int64)
    )
    found = index.ranges[index.found]
    report = DuplicateReport(
        action=action,
        checked=len(index.ranges),
        checked_bytes=segment_bytes(index.ranges),
        found=len(found),
        found_bytes=segment_bytes(found),
        dropped=len(dropped),
        dropped_bytes=segment_bytes(dropped),
        examples=tuple(index.examples),
    )
    train = subtract(splits.train, dropped)
    return Splits(splits.method, train, splits.validation, splits.test), report


def subtract(segments: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """Segments (n, 3) without the ranges ``holes`` (m, 3), each inside one segment, both ascending."""
    owner = np.searchsorted(segments[:, 1], holes[:, 1], side="right") - 1
    touched = np.zeros(len(segments), dtype=bool)
    touched[owner] = True
    rows = list[tuple[int, int, int]]()
    hole = 0
    for index in np.flatnonzero(touched).tolist():
        document, here, end = segments[index].tolist()
        while hole < len(holes) and owner[hole] == index:
            rows.append((document, here, int(holes[hole, 1])))
            here = int(holes[hole, 2])
            hole += 1
        rows.append((document, here, end))
    left = np.array([row for row in rows if row[1] < row[2]], dtype=np.int64).reshape(-1, 3)
    result = np.concatenate([segments[~touched], left])
    return result[np.argsort(result[:, 1], kind="stable")]


class _Index:
    """The held-out units, found again by the bands of their signatures."""

    def __init__(self, spool: Spool, ranges: np.ndarray, signatures: np.ndarray) -> None:
        self.spool, self.ranges = spool, ranges
        self.found = np.zeros(len(ranges), dtype=bool)
        self.examples = list[str]()
        keys = band_keys(signatures)
        self._order = [np.argsort(keys[:, b], kind="stable") for b in range(BANDS)]
        self._keys = [keys[order, b] for b, order in enumerate(self._order)]

    def match(self, chunk: _Chunk, *, everything: bool) -> np.ndarray:
        """The units of a training chunk that nearly repeat a held-out one. Unless ``everything``,
        pairs whose held-out unit was found before are not looked at again."""
        repeats = set[int]()
        for unit, held_out in self._candidates(chunk):
            if self.found[held_out] and (not everything or unit in repeats):
                continue
            document, start, end = self.ranges[held_out].tolist()
            other = shingles(words(self.spool.read(start, end))[1])
            if jaccard(chunk.shingles(unit), other) >= THRESHOLD:
                repeats.add(unit)
                self.found[held_out] = True
                if len(self.examples) < _EXAMPLES:
                    twin = self.spool.name(int(chunk.ranges[unit, 0]))
                    self.examples.append(f"{self.spool.name(document)} ~ {twin}")
        return np.array(sorted(repeats), dtype=np.int64)

    def _candidates(self, chunk: _Chunk) -> list[tuple[int, int]]:
        keys = band_keys(signatures(chunk.hashes, chunk.bounds))
        pairs = set[tuple[int, int]]()
        for band, (known, order) in enumerate(zip(self._keys, self._order, strict=True)):
            first = np.searchsorted(known, keys[:, band])
            for further in range(_ALIKE):
                places = np.minimum(first + further, len(known) - 1)
                hits = np.flatnonzero(known[places] == keys[:, band])
                pairs.update(zip(hits.tolist(), order[places[hits]].tolist(), strict=True))
        return sorted(pairs)


def signatures(hashes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """(units, 48) uint32 MinHash values of units of at least five words, ``bounds`` (units + 1,)."""
    values = (shingles(hashes) >> np.uint64(32)).astype(np.uint32)
    # Shingles across the edge of two units belong to none: they may not become a minimum.
    across = bounds[1:-1, None] - np.arange(1, WIDTH)
    keep = np.ones(len(values), dtype=bool)
    keep[across.ravel()] = False
    result = np.empty((len(bounds) - 1, BANDS * ROWS), dtype=np.uint32)
    kept = values[keep]
    starts = bounds[:-1] - (WIDTH - 1) * np.arange(len(bounds) - 1)
    for k in range(BANDS * ROWS):
        factor, shift = derive("minhash", k) | 1, derive("minhash shift", k)
        hashed = kept * np.uint32(factor & 0xFFFFFFFF) + np.uint32(shift & 0xFFFFFFFF)
        result[:, k] = np.minimum.reduceat(hashed, starts)
    return result


def band_keys(minima: np.ndarray) -> np.ndarray:
    """(units, 12) uint64: one key for each four values of the signatures (units, 48)."""
    banded = minima.reshape(len(minima), BANDS, ROWS).astype(np.uint64)
    keys = np.zeros((len(minima), BANDS), dtype=np.uint64)
    for row in range(ROWS):
        keys = mix64(keys ^ banded[:, :, row], derive("band", row))
    return keys


def _signatures_of(
    spool: Spool, segments: np.ndarray, method: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ranges and signatures of at most ``MOST_UNITS`` units, from segments in the seed's order."""
    order = np.argsort(mix64(segments[:, 1], derive("duplicates", seed)), kind="stable")
    ranges = [np.zeros((0, 3), dtype=np.int64)]
    minima = [np.zeros((0, BANDS * ROWS), dtype=np.uint32)]
    count = 0
    for chunk in _chunks(spool, segments[order], method):
        ranges.append(chunk.ranges)
        minima.append(signatures(chunk.hashes, chunk.bounds))
        count += len(chunk.ranges)
        if count >= MOST_UNITS:
            break
    return np.concatenate(ranges)[:MOST_UNITS], np.concatenate(minima)[:MOST_UNITS]


def _chunks(spool: Spool, segments: np.ndarray, method: str) -> Iterator[_Chunk]:
    """The units of the segments, about in their order; those of fewer than five words are left out."""
    wholes, size = list[tuple[int, int, int]](), 0
    for row in range(len(segments)):
        document, start, end = segments[row].tolist()
        if (method == "document" and end - start <= WHOLE) or spool.spans(document) is not None:
            wholes.append((document, start, end))
            size += end - start
            if size >= _CHUNK:
                yield from _wholes(spool, wholes)
                wholes, size = [], 0
        else:
            yield from _groups(spool, document, start, end)
    if wholes:
        yield from _wholes(spool, wholes)


def _wholes(spool: Spool, rows: list[tuple[int, int, int]]) -> Iterator[_Chunk]:
    """Documents that are one unit each."""
    rows = sorted(rows)
    texts = spool.read_each([(start, end) for _, start, end in rows])
    places, hashes = words(b"\n".join(texts))
    edges = np.searchsorted(places, np.cumsum([0, *(len(text) + 1 for text in texts)]))
    yield from _chunk(np.array(rows, dtype=np.int64), hashes, edges)


def _chunk(ranges: np.ndarray, hashes: np.ndarray, bounds: np.ndarray) -> Iterator[_Chunk]:
    """The units that have words enough, if any."""
    counts = np.diff(bounds)
    keep = counts >= WIDTH
    if keep.any():
        kept = np.concatenate([[0], counts[keep].cumsum()])
        yield _Chunk(ranges[keep], hashes[bounds[0] : bounds[-1]][np.repeat(keep, counts)], kept)


def _groups(spool: Spool, document: int, start: int, end: int) -> Iterator[_Chunk]:
    """The groups of words that a long text falls into, each up to where the next word starts."""
    for data in pieces(spool, start, end, _CHUNK):
        places, hashes = words(data)
        if len(places):
            bounds = np.array(_edges(hashes))
            here = start + np.append(places, len(data))[bounds]
            ranges = np.stack([np.full(len(here) - 1, document), here[:-1], here[1:]], axis=1)
            yield from _chunk(ranges, hashes, bounds)
        start += len(data)


def _edges(hashes: np.ndarray) -> list[int]:
    """Where groups of words begin, and the end: after 64 words, at the next shingle whose hash says so,
    after 1,024 in any case."""
    bounds = [0]
    marks = np.flatnonzero((shingles(hashes) & np.uint64(_EDGE)) == 0).tolist()
    for mark in [*marks, len(hashes)]:
        while mark - bounds[-1] > _LONGEST:
            bounds.append(bounds[-1] + _LONGEST)
        if mark - bounds[-1] >= _SHORTEST:
            bounds.append(mark)
    if bounds[-1] < len(hashes):
        bounds.append(len(hashes))
    return bounds
