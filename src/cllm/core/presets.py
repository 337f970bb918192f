"""Model sizes by name: field values that ``model.preset`` fills in under the fields given beside it."""

from __future__ import annotations

from typing import Any

from cllm.core.errors import UsageError, nearest

# Widths are multiples of 32, so that vector registers and block-quantized formats divide them.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 192, "context": 64},
    "tiny": {"d_model": 128, "n_layers": 4, "n_heads": 4, "d_ff": 384, "context": 128},
    "mini": {"d_model": 256, "n_layers": 6, "n_heads": 4, "d_ff": 768, "context": 256},
    "small": {"d_model": 384, "n_layers": 8, "n_heads": 6, "d_ff": 1024, "context": 256},
    "base": {"d_model": 768, "n_layers": 12, "n_heads": 12, "d_ff": 2048, "context": 512},
}


def preset_fields(name: str) -> dict[str, Any]:
    """Fields of the model size ``name``; ``UsageError`` with the nearest name if there is none."""
    if name not in PRESETS:
        raise UsageError(
            f"unknown preset {name!r}{nearest(name, list(PRESETS))}; known: {', '.join(PRESETS)}"
        )
    return dict(PRESETS[name])
