"""Durations as people write them: ``90``, ``90s``, ``10m``, ``1h30m``."""

from __future__ import annotations

import re

from cllm.core.errors import UsageError

_UNITS = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}
_PARTS = re.compile(r"(\d+(?:\.\d+)?)([dhms])")


def parse_duration(text: str | float) -> float:
    """Seconds of a duration; a bare number is seconds. Raises ``UsageError`` if it is none."""
    if isinstance(text, int | float) or re.fullmatch(r"\d+(\.\d+)?", text.strip()):
        seconds = float(text)
    else:
        compact = text.replace(" ", "").lower()
        parts = _PARTS.findall(compact)
        if not parts or "".join(number + unit for number, unit in parts) != compact:
            raise UsageError(f"{text!r} is no duration; write 90s, 10m or 1h30m")
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not 0 < seconds < 1e9:
        raise UsageError(f"a duration must be above zero, not {text!r}")
    return seconds
