"""What a source was when it was read: name, size and content hash."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """``size`` in bytes as stored, ``sha256`` (hex) of those bytes."""

    name: str
    size: int
    sha256: str
