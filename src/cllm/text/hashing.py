"""Keyed hashes on which every seeded choice of this floor rests.

numpy's generators and shuffles may change between versions; these few lines do not, so that a split,
a sample and an order of batches are the same wherever and whenever a seed is used again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

_BLOCK = 1 << 20


def derive(*parts: object) -> int:
    """A 64-bit key from parts: the first 8 bytes of the SHA-256 of their ``repr``s."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode("utf-8")).digest()[:8], "little")


def mix64(values: np.ndarray, key: int) -> np.ndarray:
    """uint64 array -> uint64 array of the same shape: a bijection that looks random, chosen by ``key``.

    The finaliser of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
    generators"), on values moved by the key.
    """
    x = values.astype(np.uint64) + np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def file_sha256(path: Path, start: int = 0) -> str:
    """SHA-256 (hex) of a file from byte ``start`` on, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
