"""From segments of the spool to a packed token file: encode in batches, write as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cllm.text.packed import Header, packed_writer
from cllm.text.pieces import pieces
from cllm.text.spool import Spool
from cllm.text.tokenizer import Tokenizer, segments

BATCH_BYTES = 1 << 21
"""Bytes encoded at a time: the library holds some 100 bytes for each of their tokens."""


class _Piece(NamedTuple):
    data: bytes
    counts: bool
    ends: bool
    """Whether the document ends after this piece."""


def pack_segments(
    spool: Spool,
    table: np.ndarray,
    tokenizer: Tokenizer,
    path: Path,
    key: str,
    progress: Callable[[float], None] = lambda share: None,
) -> Header:
    """Encode the segments ``table`` (n, 3) into the packed file ``path``; ``progress`` gets the share
    of bytes done. Returns the file's header; raises ``UserError`` if the file cannot be written."""
    total = max(1, int((table[:, 2] - table[:, 1]).sum()))
    done = 0
    with packed_writer(path, vocab_size=tokenizer.vocab_size, end_id=tokenizer.end_id) as writer:
        for batch in _batches(spool, table):
            encoded = tokenizer.encode_batch([piece.data.decode("utf-8") for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                writer.write(ids, len(piece.data), counts=piece.counts)
                if piece.ends:
                    writer.end_document(counts=piece.counts)
                done += len(piece.data)
            progress(done / total)
        return writer.finish(key)


def _batches(spool: Spool, table: np.ndarray) -> Iterator[list[_Piece]]:
    batch, size = list[_Piece](), 0
    for row in range(len(table)):
        document, start, end = table[row].tolist()
        for piece in _segment(spool, document, start, end):
            batch.append(piece)
            size += len(piece.data)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _segment(spool: Spool, document: int, start: int, end: int) -> Iterator[_Piece]:
    """Pieces of one segment, cut at the edges of what the loss counts on. The end token counts where
    the last answer runs up to it."""
    spans = spool.spans(document)
    if spans is None:
        parts: list[tuple[int, int, bool]] = [(start, end, True)]
    else:
        local = [(a - start, b - start) for a, b in spans]
        parts = [(start + a, start + b, c) for a, b, c in segments(end - start, local)]
    for first, last, counts in parts:
        here = first
        for data in pieces(spool, first, last):
            here += len(data)
            yield _Piece(data, counts, here == end)
