"""Training, validation and test: by whole documents, or by contiguous blocks where documents are few.

A split is a table of segments, (n, 3) int64 rows (document, start, end), byte ranges of the spool in
ascending order. Which document or block is held out depends on its own hash and the seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cllm.core.errors import UsageError, UserError
from cllm.text.hashing import derive, mix64
from cllm.text.spool import Spool

BLOCKS_HELD_OUT = 4
"""Blocks that each held-out split is spread over, so that it is not one chapter only."""
SMALL_BLOCK = 4096
"""Bytes below which a held-out share is left in one block: more seams would be noise."""
_WINDOW = 4096


@dataclass(frozen=True, eq=False)
class Splits:
    """The three tables of segments and the method that made them."""

    method: Literal["document", "block"]
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def items(self) -> list[tuple[str, np.ndarray]]:
        """(name, segments) of the three."""
        return [("train", self.train), ("validation", self.validation), ("test", self.test)]


def segment_bytes(segments: np.ndarray) -> int:
    """Bytes of a table of segments."""
    return int((segments[:, 2] - segments[:, 1]).sum())


def whole_corpus(spool: Spool) -> np.ndarray:
    """All documents as one table of segments."""
    return np.stack([np.arange(spool.documents), spool.ends[:-1], spool.ends[1:]], axis=1)


def split_corpus(
    spool: Spool,
    *,
    validation: float,
    test: float,
    method: Literal["auto", "document", "block"],
    seed: int,
) -> Splits:
    """Split by shares of the bytes (in [0, 1); a share of 0 gives an empty split).

    ``auto`` takes documents where those small enough to be drawn are at least half of the corpus, and
    drawing them leaves something for each part.
    Documents of equal text always land in the same split. Raises ``UserError`` if the corpus has too
    few documents or bytes for the parts asked for, ``UsageError`` for blocks of records with prompts.
    """
    if method == "block" and spool.masked:
        raise UsageError(
            "data.split = 'block' would cut prompt/completion and chat records in two; "
            "set data.split = 'document'"
        )
    free = method == "auto" and not spool.masked
    if method == "auto":
        small = _small(spool, validation, test)
        fits = np.diff(spool.ends)[small].sum() >= spool.size / 2
        method = "document" if fits or spool.masked else "block"
    by = _by_document if method == "document" else _by_block
    splits = by(spool, validation, test, seed)
    if free and _empty(splits, validation, test):
        splits = _by_block(spool, validation, test, seed)
    for name in _empty(splits, validation, test):
        raise UserError(
            f"the corpus is too short to split: {spool.size:,} bytes in "
            f"{len(np.unique(spool.digests)):,} different documents leave nothing for {name}; "
            "give more text, or set data.split = 'block'"
        )
    return splits


def _empty(splits: Splits, validation: float, test: float) -> list[str]:
    """Parts that were asked for and have nothing."""
    shares = {"train": 1.0, "validation": validation, "test": test}
    return [name for name, segments in splits.items() if shares[name] and not len(segments)]


def _copies(spool: Spool) -> np.ndarray:
    """For each document, the bytes of all documents of the same text together."""
    _, group = np.unique(spool.digests, return_inverse=True)
    return np.bincount(group, weights=np.diff(spool.ends))[group].astype(np.int64)


def _small(spool: Spool, validation: float, test: float) -> np.ndarray:
    """Which documents may be held out: with their copies they are no half of a held-out split."""
    share = min((s for s in (validation, test) if s > 0), default=1.0)
    return _copies(spool) <= spool.size * share / 2


def _by_document(spool: Spool, validation: float, test: float, seed: int) -> Splits:
    sizes, drawn = np.diff(spool.ends), _small(spool, validation, test)
    wanted = min(1.0, 2 * (validation + test)) * spool.size
    if sizes[drawn].sum() < wanted:
        # Most are large: whoever asks for whole documents all the same has the smaller ones drawn.
        copies = _copies(spool)
        ascending = np.argsort(copies, kind="stable")
        enough = np.searchsorted(sizes[ascending].cumsum(), wanted)
        drawn = copies <= copies[ascending[min(int(enough), len(sizes) - 1)]]
    hashes = mix64(spool.digests, derive("split", seed))
    order = np.argsort(hashes, kind="stable")
    order = order[drawn[order]]
    # A document begins where the first one of equal text does, so copies stay together.
    first_copy = np.searchsorted(hashes[order], hashes[order], side="left")
    ends = sizes[order].cumsum()
    begins = (ends - sizes[order])[first_copy]
    part = np.zeros(len(sizes), dtype=np.int8)
    part[order[begins < test * spool.size]] = 2
    tested = int(sizes[part == 2].sum())
    chosen = (begins >= test * spool.size) & (begins < tested + validation * spool.size)
    part[order[chosen]] = 1
    table = whole_corpus(spool)
    return Splits("document", *(table[part == i] for i in range(3)))


def _by_block(spool: Spool, validation: float, test: float, seed: int) -> Splits:
    share = min((s for s in (validation, test) if s > 0), default=1.0)
    smallest = spool.size * share
    size = max(smallest / BLOCKS_HELD_OUT, min(smallest, SMALL_BLOCK), 1.0)
    count = max(1, round(spool.size / size))
    edges = [_cut(spool, i * spool.size // count, int(size / 4)) for i in range(1, count)]
    edges = sorted({0, *edges, spool.size})
    blocks = np.arange(len(edges) - 1)
    order = np.argsort(mix64(blocks, derive("split", seed)), kind="stable")
    tests = max(1, round(test * count)) if test else 0
    validations = max(1, round(validation * count)) if validation else 0
    part = np.zeros(len(blocks), dtype=np.int8)
    part[order[:tests]] = 2
    part[order[tests : tests + validations]] = 1
    bounds = np.asarray(edges)
    tables = [
        _segments(spool.ends, bounds[:-1][part == i], bounds[1:][part == i]) for i in range(3)
    ]
    return Splits("block", *tables)


def _cut(spool: Spool, position: int, window: int) -> int:
    """The best place to cut at or a little after ``position``: the end of a document, else of a line,
    else a space, else the next character."""
    end = min(position + min(max(window, 4), _WINDOW), spool.size)
    document_end = int(spool.ends[np.searchsorted(spool.ends, position)])
    if document_end <= end:
        return document_end
    data = spool.read(position, end)
    for separator in (b"\n", b" "):
        if (at := data.find(separator)) >= 0:
            return position + at + 1
    return position + next((i for i, byte in enumerate(data) if byte & 0xC0 != 0x80), 0)


def _segments(ends: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Byte ranges cut at the ends of documents, neighbours of one document joined."""
    rows = list[list[int]]()
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        document = int(np.searchsorted(ends, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(ends[document + 1]))
            if rows and rows[-1][0] == document and rows[-1][2] == start:
                rows[-1][2] = end
            else:
                rows.append([document, start, end])
            start, document = end, document + 1
    return np.array(rows, dtype=np.int64).reshape(-1, 3)
