"""The frame around every codec's bytes: magic, version, codec, shape, length and checksum.

``magic 4 | version 1 | length of name 1 | name | rows 4 | columns 4 | length of body 8 | CRC-32 4 | body``,
little-endian; the checksum is over everything else. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

MAGIC = b"cLtb"
VERSION = 1
# Rows · columns beyond this are refused: bytes that few could make anyone allocate without bound.
LARGEST = 2**33


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What stands around a codec's body."""

    codec: str
    shape: tuple[int, int]
    body: bytes


def pack(codec: str, shape: tuple[int, int], body: bytes) -> bytes:
    """The self-describing bytes of ``body``."""
    name = codec.encode("ascii")
    head = MAGIC + struct.pack("<BB", VERSION, len(name)) + name
    head += struct.pack("<IIQ", *shape, len(body))
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


def unpack(data: bytes) -> Frame:
    """The frame of ``data``. Raises ``ValueError`` saying what is wrong with foreign, newer, truncated
    or damaged bytes."""
    data = bytes(data)
    if data[:4] != MAGIC:
        raise ValueError(f"these {len(data)} bytes are no stored table: they begin {data[:4]!r}")
    reader = Reader(data, 4)
    version = reader.number("<B")
    if version != VERSION:
        raise ValueError(f"the table's format {version} is not known here ({VERSION} is)")
    name = reader.take(reader.number("<B"))
    rows, columns, length = (reader.number("<I"), reader.number("<I"), reader.number("<Q"))
    head = data[: reader.place]
    check = reader.number("<I")
    body = reader.take(length)
    reader.end()
    if zlib.crc32(body, zlib.crc32(head)) != check:
        raise ValueError("damaged table: its checksum does not fit")
    if not name.isascii() or rows * columns > LARGEST or not rows or not columns:
        raise ValueError(f"damaged table: a shape of ({rows}, {columns})")
    return Frame(codec=name.decode("ascii"), shape=(rows, columns), body=body)


class Reader:
    """Takes parts off bytes from the front; ``ValueError`` where there are too few or too many."""

    def __init__(self, data: bytes, place: int = 0) -> None:
        self.data, self.place = data, place

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count > len(self.data) - self.place:
            raise ValueError("damaged table: it is cut short")
        part = self.data[self.place : self.place + count]
        self.place += count
        return part

    def number(self, kind: str) -> Any:
        """The next number of a ``struct`` kind."""
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def array(self, dtype: str, count: int) -> np.ndarray:
        """The next ``count`` values."""
        return np.frombuffer(self.take(np.dtype(dtype).itemsize * count), dtype=dtype)

    def end(self) -> None:
        """Refuse what is left over."""
        if self.place != len(self.data):
            raise ValueError("damaged table: there are bytes after its end")


def as_table(array: Any) -> np.ndarray:
    """``array`` as float32 (V, D). Raises ``ValueError`` naming the shape of what is no such table."""
    table = np.asarray(array)
    if table.ndim != 2 or not table.size:
        raise ValueError(
            f"a table is an array (rows, columns) with entries, not of shape {table.shape}"
        )
    if table.dtype.kind not in "fiu":
        raise ValueError(
            f"a table of shape {table.shape} must be of real numbers, not {table.dtype}"
        )
    with np.errstate(over="ignore"):
        table = table.astype(np.float32)
    if not np.isfinite(table).all():
        raise ValueError(
            f"the table of shape {table.shape} holds NaN or infinity; take an earlier checkpoint, or mend "
            "these rows"
        )
    return table
