"""Packed token files: one split of a corpus as a flat array of token ids on disk.

Layout, little-endian: a 256-byte header, the tokens (uint16, or uint32 for more than 65,536 entries),
then, where the loss leaves tokens out, a bit for each token (1 = counts, low bit first). The stream is
END, document, END, document, … END: it *begins* with an end token, so that each text token has a
context and is predicted exactly once.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from cllm.core.atomic import new_file
from cllm.core.errors import UserError
from cllm.text.hashing import file_sha256

MAGIC = b"cllm-tok"
VERSION = 1
HEADER_BYTES = 256
_FIELDS = struct.Struct("<8sHHI5Q32s32s")
_MASKED = 1


@dataclass(frozen=True, slots=True)
class Header:
    """The counts of a packed file. ``text_bytes`` are UTF-8 bytes of the documents, ``scored_bytes``
    those the loss counts on (bits per byte divides by them); ``scored_tokens`` are targets that count,
    end tokens among them."""

    itemsize: int
    masked: bool
    tokens: int
    documents: int
    text_bytes: int
    scored_bytes: int
    scored_tokens: int
    key: str
    """SHA-256 (hex) of sources, settings and tokenizer."""
    payload_sha256: str

    def pack(self) -> bytes:
        """256 bytes, the last 32 of them the SHA-256 of the others."""
        fields = _FIELDS.pack(
            MAGIC,
            VERSION,
            self.itemsize,
            _MASKED if self.masked else 0,
            self.tokens,
            self.documents,
            self.text_bytes,
            self.scored_bytes,
            self.scored_tokens,
            bytes.fromhex(self.key),
            bytes.fromhex(self.payload_sha256),
        )
        body = fields.ljust(HEADER_BYTES - 32, b"\0")
        return body + hashlib.sha256(body).digest()

    @classmethod
    def unpack(cls, data: bytes, path: Path) -> Header:
        """Raises ``UserError`` naming ``path`` if these bytes are no whole header of this version."""
        if len(data) < HEADER_BYTES or data[:8] != MAGIC:
            raise UserError(f"{path} is no packed token file of cllm, or is cut short")
        body, digest = data[: HEADER_BYTES - 32], data[HEADER_BYTES - 32 : HEADER_BYTES]
        _, version, itemsize, flags, a, b, c, d, e, key, payload = _FIELDS.unpack_from(body)
        if version != VERSION:
            raise UserError(
                f"{path} has format version {version}, this cllm reads {VERSION}; prepare the data anew"
            )
        if hashlib.sha256(body).digest() != digest:
            raise UserError(f"the header of {path} was altered; prepare the data anew")
        return cls(itemsize, bool(flags & _MASKED), a, b, c, d, e, key.hex(), payload.hex())

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        mask = -(-self.tokens // 8) if self.masked else 0
        return HEADER_BYTES + self.tokens * self.itemsize + mask


@dataclass(frozen=True, slots=True, eq=False)
class PackedTokens:
    """A split: ``ids`` (tokens,) uint16 or uint32, mapped from the file, and its header.

    ``mask_bits`` is a bit a token (1 = the loss counts on it as a target), or ``None``: all count.
    """

    ids: np.ndarray
    mask_bits: np.ndarray | None
    header: Header
    path: Path | None = None

    @classmethod
    def open(cls, path: str | Path, *, key: str | None = None, verify: bool = True) -> PackedTokens:
        """Map a file. Raises ``UserError`` naming it if it is missing, truncated or altered (``verify``
        reads it all for that), or was made for another ``key``."""
        path = Path(path)
        try:
            with open(path, "rb") as file:
                header = Header.unpack(file.read(HEADER_BYTES), path)
        except FileNotFoundError as error:
            raise UserError(f"there is no packed token file {path}") from error
        size = path.stat().st_size
        if size != header.file_bytes:
            raise UserError(
                f"{path} has {size:,} bytes where its header says {header.file_bytes:,}; it was "
                "truncated or altered: prepare the data anew"
            )
        if key is not None and header.key != key:
            raise UserError(f"{path} belongs to other data or settings; prepare the data anew")
        if verify and file_sha256(path, HEADER_BYTES) != header.payload_sha256:
            raise UserError(f"the tokens of {path} were altered; prepare the data anew")
        dtype = np.dtype("<u2" if header.itemsize == 2 else "<u4")
        # A plain array over the map: np.memmap as a class costs microseconds at every slice.
        whole = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        end = HEADER_BYTES + header.tokens * header.itemsize
        mask = whole[end:] if header.masked else None
        return cls(whole[HEADER_BYTES:end].view(dtype), mask, header, path)

    @classmethod
    def from_arrays(
        cls, ids: np.ndarray, *, text_bytes: int, mask: np.ndarray | None = None
    ) -> PackedTokens:
        """A stream in memory (for benches and tests): ``ids`` (tokens,), the first and the last of them
        the end token; ``mask`` (tokens,) bool."""
        assert len(ids) >= 2, "a stream begins and ends with the end token"
        assert ids[0] == ids[-1]
        dtype = packed_dtype(int(ids.max()) + 1)
        counts = len(ids) - 1 if mask is None else int(mask[1:].sum())
        header = Header(
            itemsize=dtype.itemsize,
            masked=mask is not None,
            tokens=len(ids),
            documents=int((ids == ids[0]).sum()) - 1,
            text_bytes=text_bytes,
            scored_bytes=text_bytes,
            scored_tokens=counts,
            key="00" * 32,
            payload_sha256="00" * 32,
        )
        bits = None if mask is None else np.packbits(mask, bitorder="little")
        return cls(ids.astype(dtype), bits, header)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        """Documents (or blocks) in the stream."""
        return self.header.documents

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return self.header.text_bytes

    @property
    def scored_bytes(self) -> int:
        """UTF-8 bytes that the loss counts on: the divisor of bits per byte."""
        return self.header.scored_bytes

    @property
    def scored_tokens(self) -> int:
        """Targets that count, end tokens among them."""
        return self.header.scored_tokens

    def counts(self, positions: np.ndarray) -> np.ndarray:
        """Whether the loss counts on the tokens at these positions (bool, same shape)."""
        if self.mask_bits is None:
            return np.ones(positions.shape, dtype=bool)
        bits = self.mask_bits[positions >> 3] >> (positions & 7).astype(np.uint8)
        return (bits & 1).astype(bool)


def packed_dtype(vocab_size: int) -> np.dtype:
    """uint16 where it holds every id, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class PackedWriter:
    """Writes one packed file as the tokens come; ``packed_writer`` opens it."""

    def __init__(
        self, file: IO[bytes], mask_file: IO[bytes], *, vocab_size: int, end_id: int
    ) -> None:
        assert 0 <= end_id < vocab_size
        self._file, self._mask_file = file, mask_file
        self._dtype = packed_dtype(vocab_size)
        self._digest = hashlib.sha256()
        self._end = np.array([end_id])
        self._masked = self.finished = False
        self.tokens = self.documents = self.text_bytes = 0
        self.scored_bytes = self.scored_tokens = 0
        self._file.write(b"\0" * HEADER_BYTES)
        self._append(self._end, counts=False)  # a context, never a target
        self._masked = False

    def write(self, ids: np.ndarray, text_bytes: int, *, counts: bool = True) -> None:
        """Append tokens of the present document that encode ``text_bytes`` bytes of it."""
        self.text_bytes += text_bytes
        self.scored_bytes += text_bytes if counts else 0
        self._append(ids, counts)

    def end_document(self, *, counts: bool = True) -> None:
        """Close the present document; its end token ``counts`` where an answer ends there."""
        self.documents += 1
        self._append(self._end, counts)

    def _append(self, ids: np.ndarray, counts: bool) -> None:
        block = ids.astype(self._dtype).tobytes()
        self._file.write(block)
        self._digest.update(block)
        self._mask_file.write((b"\1" if counts else b"\0") * len(ids))
        self._masked |= not counts
        self.tokens += len(ids)
        self.scored_tokens += len(ids) if counts else 0

    def finish(self, key: str) -> Header:
        """Write mask and header; the file is whole after this."""
        if self._masked:
            self._mask_file.seek(0)
            while block := self._mask_file.read(1 << 20):
                bits = np.packbits(np.frombuffer(block, np.uint8), bitorder="little").tobytes()
                self._file.write(bits)
                self._digest.update(bits)
        header = Header(
            itemsize=self._dtype.itemsize,
            masked=self._masked,
            tokens=self.tokens,
            documents=self.documents,
            text_bytes=self.text_bytes,
            scored_bytes=self.scored_bytes,
            scored_tokens=self.scored_tokens,
            key=key,
            payload_sha256=self._digest.hexdigest(),
        )
        self._file.seek(0)
        self._file.write(header.pack())
        self.finished = True
        return header


@contextmanager
def packed_writer(path: Path, *, vocab_size: int, end_id: int) -> Iterator[PackedWriter]:
    """Open a packed file for writing; it appears at ``path``, whole, when the block ends well, with
    ``finish`` as its last call.

    Raises ``UserError`` for a full disk or a place that may not be written.
    """
    with new_file(path) as file, tempfile.TemporaryFile(dir=path.parent) as mask_file:
        writer = PackedWriter(file, mask_file, vocab_size=vocab_size, end_id=end_id)
        yield writer
        assert writer.finished
