"""What compressing a run made: the file, what it costs, and the figures of the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.compress.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What was made: the file, its bits per byte (``None`` without validation text), and figures."""

    path: Path
    bytes: int
    settings: Settings
    base: float | None
    bpb: float | None
    parameters: int
    layer_parameters: int
    layer_bytes: int
    recovery: dict[str, Any] | None = None
    """What recovery found: ``bpb_before``, ``divergence_before``, ``divergence``, ``step``."""
    forecast: dict[str, Any] | None = None
    """What was predicted before: ``rise``, ``low``, ``high`` and, by layer, ``layers``."""
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file over all weights."""
        return 8 * self.bytes / self.parameters

    @property
    def layer_bits(self) -> float:
        """Bits a weight of the linear layers, scales and all else that is theirs included."""
        return 8 * self.layer_bytes / max(self.layer_parameters, 1)

    @property
    def rise(self) -> float | None:
        """Rise of the bits per byte."""
        return None if self.bpb is None or self.base is None else self.bpb - self.base
