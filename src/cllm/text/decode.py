"""Bytes to text: UTF-8, strictly. What is no UTF-8 is reported with its offset, never replaced."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from cllm.core.errors import UserError, require
from cllm.text.notes import Notes

BLOCK = 1 << 20
"""Bytes read at a time, about."""
_UTF8_BOM = b"\xef\xbb\xbf"
_WIDE = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_OFFSETS_SHOWN = 3
_WINDOW = 4096
_CUT = "unexpected end of data"  # the codec's name for a character whose end is missing


def read_blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes in blocks of about ``BLOCK``; ``.gz`` and ``.zst`` are decompressed as they are
    read. Raises ``UserError`` naming the file where it cannot be read or is broken or cut short."""
    suffix = path.suffix.lower()
    try:
        with open(path, "rb") as raw:
            if suffix == ".zst":
                yield from _zstd_blocks(raw, path.name)
            else:
                file = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw
                while block := file.read(BLOCK):
                    yield block
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is broken or cut short: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _zstd_blocks(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """Frames one after the other. zstandard's own reader takes the end of the file for the end of the
    data, even in the middle of a frame; this one raises ``EOFError``."""
    zstandard = require("zstandard", "zstd", f"reading {name}")
    frame, parts, size = None, list[bytes](), 0
    # Small portions, since a kilobyte may stand for megabytes of repeated text.
    while portion := raw.read(1024):
        while portion:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                parts.append(frame.decompress(portion))
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            size += len(parts[-1])
            portion = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
        if size >= BLOCK:
            yield b"".join(parts)
            parts, size = [], 0
    if frame is not None:
        raise EOFError("the last frame is not complete")
    if size:
        yield b"".join(parts)


def decode_blocks(blocks: Iterator[bytes], name: str, notes: Notes) -> Iterator[str]:
    """Text of UTF-8 blocks, in pieces that end between characters.

    At the first byte that is no UTF-8, or a NUL byte (no text file holds one), yielding stops, the
    rest is looked through, and ``notes`` gets one problem that names the file, the first byte offsets
    (in the decompressed data) and the number of bad bytes. A UTF-8 byte order mark is dropped, and
    remarked on.
    """
    offset, pending, bad = 0, b"", _Bad()
    for number, block in enumerate(blocks):
        data = pending + block
        if number == 0:
            if wide := next((label for bom, label in _WIDE.items() if data.startswith(bom)), None):
                notes.problem(
                    f"{name} is {wide}, not UTF-8; convert it first (iconv -f {wide} -t UTF-8)"
                )
                return
            if data.startswith(_UTF8_BOM):
                data, offset = data[len(_UTF8_BOM) :], len(_UTF8_BOM)
                notes.remark("byte order mark dropped", name)
        if (nul := data.find(b"\0")) >= 0:
            notes.problem(f"{name} is binary (NUL byte at offset {offset + nul:,}), not text")
            return
        text, used = _decode(data, offset, bad, final=False)
        pending, offset = data[used:], offset + used
        if text and not bad.count:
            yield text
    _decode(pending, offset, bad, final=True)
    if bad.count:
        where = ", ".join(f"{o:,}" for o in bad.offsets)
        notes.problem(
            f"{name} is not UTF-8: {bad.count:,} undecodable byte{'s'[: bad.count > 1]}, "
            f"{'first at offsets' if bad.count > 1 else 'at offset'} {where}; convert the file to UTF-8"
        )


class _Bad:
    """Undecodable bytes: how many, and where the first few are."""

    def __init__(self) -> None:
        self.count, self.offsets = 0, list[int]()

    def add(self, offset: int, length: int) -> None:
        self.count += length
        if len(self.offsets) < _OFFSETS_SHOWN:
            self.offsets.append(offset)


def _decode(data: bytes, offset: int, bad: _Bad, *, final: bool) -> tuple[str, int]:
    """Decode as far as whole characters go: (text, bytes used). Where bad bytes are, they are noted and
    there is no text."""
    try:
        return data.decode("utf-8"), len(data)
    except UnicodeDecodeError as error:
        if error.reason == _CUT and not final:
            return data[: error.start].decode("utf-8"), error.start
    for start, end, kind in utf8_runs(data):
        if kind == "cut" and not final:
            return "", start
        if kind != "text":
            bad.add(offset + start, end - start)
    return "", len(data)


def utf8_runs(data: bytes) -> Iterator[tuple[int, int, Literal["text", "bad", "cut"]]]:
    """(start, end, kind) of runs that ``data`` is made of: text, what is no UTF-8, and last perhaps
    the beginning of a character that is cut off. Linear in time however many bad bytes there are."""
    here = 0
    while here < len(data):
        window = data[here : here + _WINDOW]
        stop, bad = len(window), 0
        kind: Literal["bad", "cut"] = "bad"
        try:
            window.decode("utf-8")
        except UnicodeDecodeError as error:
            stop = error.start
            if error.reason != _CUT:
                bad = error.end - error.start
            elif here + len(window) == len(data):
                bad, kind = error.end - error.start, "cut"
        if stop:
            yield here, here + stop, "text"
        if bad:
            yield here + stop, here + stop + bad, kind
        here += stop + bad
