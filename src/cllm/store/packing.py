"""Integers of few bits as bytes, and llama.cpp's blocks; and a matrix on a grid as kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Q4_0_BYTES, Q8_0_BYTES = 18, 34
"""Bytes of a block of 32 weights: an fp16 scale, and 4 or 8 bits of each."""

_AT_ONCE = 2**20
"""Codes of rows that are packed at a time, each of which takes some bytes meanwhile."""


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes in [0, 2^bits) of any shape as a flat uint8 tensor, the lowest bits first.

    A byte holds 8/bits codes; three bytes hold eight of 3 bits. What is missing at the end is zeros.
    """
    flat = codes.reshape(-1).numpy().astype(np.uint32)
    assert not flat.size or int(flat.max()) < 1 << bits
    per, width = _word(bits)
    words = np.zeros((-(-flat.size // per), per), dtype=np.uint32)
    words.reshape(-1)[: flat.size] = flat
    packed = np.zeros(len(words), dtype=np.uint32)
    for place in range(per):
        packed |= words[:, place] << np.uint32(bits * place)
    data = packed.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]
    return torch.from_numpy(np.ascontiguousarray(data).reshape(-1))


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The (count,) uint8 codes that ``pack_codes`` packed. Raises ``ValueError`` for too few bytes."""
    per, width = _word(bits)
    data = packed.numpy()
    if data.size != -(-count // per) * width:
        raise ValueError(f"{data.size} bytes do not hold {count} codes of {bits} bits")
    out = np.empty((data.size // width, per), dtype=np.uint8)
    if width == 1:
        mask = np.uint8((1 << bits) - 1)
        for place in range(per):
            np.bitwise_and(data >> np.uint8(bits * place), mask, out=out[:, place])
    else:
        parts = data.reshape(-1, width).astype(np.uint32)
        words = parts[:, 0] | parts[:, 1] << np.uint32(8) | parts[:, 2] << np.uint32(16)
        for place in range(per):
            out[:, place] = words >> np.uint32(bits * place) & np.uint32((1 << bits) - 1)
    return torch.from_numpy(out.reshape(-1)[:count])


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Rows (m, n) of codes as rows (m, bytes) of uint8: each is what ``pack_codes`` makes of it."""
    per, width = _word(bits)
    m, n = codes.shape
    words = -(-n // per)
    out = torch.empty(m, words * width, dtype=torch.uint8)
    some = max(_AT_ONCE // max(n, 1), 1)
    for rows in (slice(i, min(i + some, m)) for i in range(0, m, some)):
        padded = functional.pad(codes[rows], (0, words * per - n))
        out[rows] = pack_codes(padded, bits).view(len(padded), words * width)
    return out


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The (m, columns) uint8 codes that ``pack_rows`` packed. Raises ``ValueError`` for rows of another
    size."""
    per, width = _word(bits)
    words = -(-columns // per)
    if packed.ndim != 2 or packed.shape[1] != words * width:
        raise ValueError(
            f"rows of {tuple(packed.shape)} bytes do not hold {columns} codes of {bits} bits"
        )
    flat = unpack_codes(packed.reshape(-1), bits, len(packed) * words * per)
    return flat.view(len(packed), words * per)[:, :columns]


def _word(bits: int) -> tuple[int, int]:
    """Codes and bytes of a word."""
    return {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}[bits]


def q4_0_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    """(m, n/32 · 18) uint8: llama.cpp's ``block_q4_0`` of codes −8 … 7 (m, n) and scales (m, n/32).

    A block is the fp16 scale d and 16 bytes, the i-th with entry i in its low and entry 16 + i in its
    high half, each plus 8; a weight is d · (q − 8).
    """
    m = len(codes)
    q = (codes.numpy() + 8).astype(np.uint8).reshape(m, -1, 2, 16)
    return _blocks(scale, q[:, :, 0] | q[:, :, 1] << np.uint8(4))


def q8_0_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    """(m, n/32 · 34) uint8: llama.cpp's ``block_q8_0`` of codes −127 … 127: the fp16 scale and 32 int8."""
    q = codes.numpy().astype(np.int8).reshape(len(codes), -1, 32)
    return _blocks(scale, q.view(np.uint8))


def _blocks(scale: Tensor, body: np.ndarray) -> Tensor:
    head = scale.numpy().astype("<f2", order="C").view(np.uint8).reshape(*body.shape[:2], 2)
    return torch.from_numpy(np.concatenate([head, body], axis=2).reshape(len(body), -1))


def read_blocks(blocks: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(m, n) int8 codes and (m, n/32) fp16 scales of ``gguf-q4_0`` or ``gguf-q8_0`` blocks.

    Raises ``ValueError`` where the rows are not whole blocks.
    """
    size = {"gguf-q4_0": Q4_0_BYTES, "gguf-q8_0": Q8_0_BYTES}[kind]
    m = len(blocks)
    if blocks.ndim != 2 or blocks.shape[1] % size:
        raise ValueError(f"rows of {tuple(blocks.shape)} bytes are no whole blocks of {size}")
    data = blocks.numpy().reshape(m, -1, size)
    scale = np.ascontiguousarray(data[:, :, :2]).view("<f2")[:, :, 0]
    body = data[:, :, 2:]
    if kind == "gguf-q4_0":
        low, high = body & np.uint8(15), body >> np.uint8(4)
        codes = np.concatenate([low, high], axis=2).astype(np.int8) - np.int8(8)
    else:
        codes = np.ascontiguousarray(body).view(np.int8)
    return torch.from_numpy(codes.reshape(m, -1)), torch.from_numpy(scale.copy())


@dataclass(frozen=True, eq=False)
class GridMatrix:
    """A matrix (m, n) of small integers, as kernels for int4 and int8 take it.

    weight[r, j] = ``offset``[r, g] + ``scale``[r, g] · ``codes``[r, j] with g = j // ``group``.

    Attributes:
        codes: (m, n) int8.
        scale: (m, groups) fp16.
        offset: (m, groups) fp16, or ``None`` where it is 0.
        group: columns that share a scale; the last group may be shorter.
        bits: of a code.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    group: int
    bits: int

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(m, n) weights, computed in float32 and then rounded to ``dtype``."""
        m, n = self.codes.shape
        whole = n - n % self.group
        out = torch.empty(m, n)
        for begin, end in ((0, whole), (whole, n)):
            if begin == end:
                continue
            first, groups = begin // self.group, -(-(end - begin) // self.group)
            picked = slice(first, first + groups)
            part = self.codes[:, begin:end].reshape(m, groups, -1).float()
            part *= self.scale[:, picked, None].float()
            if self.offset is not None:
                part += self.offset[:, picked, None].float()
            out[:, begin:end] = part.view(m, -1)
        return out.to(dtype)

    def packed_int4(self) -> Tensor:
        """(m, ⌈n/2⌉) uint8: two codes of at most 4 bits a byte, the even column in the low half,
        each plus 8, so that it is 0 … 15. Raises ``ValueError`` for 8-bit codes."""
        if self.bits > 4:
            raise ValueError(f"codes of {self.bits} bits do not fit into four")
        m, n = self.codes.shape
        shifted = (self.codes + 8).to(torch.uint8)
        padded = torch.zeros(m, n + n % 2, dtype=torch.uint8)
        padded[:, :n] = shifted
        return padded[:, 0::2] | padded[:, 1::2] << 4
