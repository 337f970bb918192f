"""The spool: the text of all documents, decoded once, one after the other in a temporary file.

Every later pass (split, duplicates, tokenizer, packing) reads byte ranges of it, so no source is
parsed twice, a source that changes underneath changes nothing, and memory holds 16 bytes a document
(and 16 a span) however long the corpus is. It costs the corpus's size on disk while data are prepared.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import IO

import numpy as np

from cllm.text.document import Document


class Spool:
    """Documents as UTF-8 on disk. ``add`` them all, ``freeze``, then read ranges."""

    def __init__(self, text_file: IO[bytes], name_file: IO[bytes]) -> None:
        self._text, self._names = text_file, name_file
        self._ends = array("q", [0])
        self._name_ends = array("q", [0])
        self._digests = array("Q")
        self._spans = array("q")
        self._span_counts = array("q")
        self._digest = hashlib.sha256()
        self._document = hashlib.blake2b(digest_size=8)
        self.masked = False

    def add(self, document: Document) -> None:
        """Append a document, or a piece of the last one. Empty documents are passed over."""
        data = document.text.encode("utf-8")
        if not data:
            return
        if not document.continues or len(self._ends) == 1:
            self._close()
            name = document.name.encode("utf-8", errors="replace")
            self._names.write(name)
            self._name_ends.append(self._name_ends[-1] + len(name))
            self._ends.append(self._ends[-1])
            self._add_spans(document)
        self._text.write(data)
        self._digest.update(data)
        self._document.update(data)
        self._ends[-1] += len(data)

    def _add_spans(self, document: Document) -> None:
        """Character ranges as byte ranges of the file; -1 spans mean that everything counts."""
        if document.spans is None:
            self._span_counts.append(-1)
            return
        self.masked = True
        self._span_counts.append(len(document.spans))
        here, last = self._ends[-1], 0
        for edge in (edge for span in document.spans for edge in span):
            here += len(document.text[last:edge].encode("utf-8"))
            last = edge
            self._spans.append(here)

    def _close(self) -> None:
        """End the present document: its own hash goes to the table, its length into the corpus's."""
        if len(self._ends) > 1:
            self._digests.append(int.from_bytes(self._document.digest(), "little"))
            length = self._ends[-1] - self._ends[-2]
            self._digest.update(b"\0%d\0" % length)
            self._document = hashlib.blake2b(digest_size=8)

    def freeze(self) -> None:
        """No document comes any more; the arrays below are valid from now on."""
        self._close()
        self._text.flush()
        self._names.flush()
        self._digest.update(
            np.asarray(self._spans).tobytes() + np.asarray(self._span_counts).tobytes()
        )
        self.ends = np.asarray(self._ends)
        """(documents + 1,) int64: document i is the bytes [ends[i], ends[i + 1])."""
        self.digests = np.asarray(self._digests)
        """(documents,) uint64: a hash of each document's text."""
        self._span_ends = np.concatenate(
            [[0], np.maximum(np.asarray(self._span_counts), 0).cumsum()]
        )

    @property
    def documents(self) -> int:
        """How many."""
        return len(self._ends) - 1

    @property
    def size(self) -> int:
        """UTF-8 bytes of all documents."""
        return self._ends[-1]

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of all texts, each with its length after it, and of the spans."""
        return self._digest.hexdigest()

    def read(self, start: int, end: int) -> bytes:
        """The bytes of a range of the corpus."""
        self._text.seek(start)
        data = self._text.read(end - start)
        assert len(data) == end - start
        return data

    def read_each(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        """The bytes of many ranges, ascending: in one go where they lie close together."""
        first, last = ranges[0][0], ranges[-1][1]
        if last - first > 2 * sum(end - start for start, end in ranges):
            return [self.read(start, end) for start, end in ranges]
        data = self.read(first, last)
        return [data[start - first : end - first] for start, end in ranges]

    def name(self, document: int) -> str:
        """The name of a document."""
        start, end = self._name_ends[document], self._name_ends[document + 1]
        self._names.seek(start)
        return self._names.read(end - start).decode("utf-8")

    def spans(self, document: int) -> list[tuple[int, int]] | None:
        """Byte ranges of the corpus that the loss counts on in a document; ``None``: all of it."""
        if self._span_counts[document] < 0:
            return None
        edges = self._spans[2 * self._span_ends[document] : 2 * self._span_ends[document + 1]]
        return list(zip(edges[::2], edges[1::2], strict=True))
