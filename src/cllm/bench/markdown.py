"""Tables of results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MEASURED = "measured"
"""The column of what a claim was measured to be."""


def bound(value: float | None, higher: bool) -> str:
    """What is required of a claim."""
    if value is None:
        return "–"
    return f"{'≥' if higher else '≤'} {cell(value, MEASURED)}"


def markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a table, numbers to the right."""
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[cell(row.get(name), name) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (w - 1) + ":" if right else "-" * w for w, right in zip(widths, numeric, strict=True)
    ]
    return [line(names), f"| {' | '.join(rule)} |", *map(line, cells)]


def cell(value: Any, name: str = "") -> str:
    """A value of the column ``name`` as text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if name == "bits per byte":  # whose differences are in the third digit after the point
            return f"{value:.4f}"
        digits = 4 if name == MEASURED else 3  # what is within half a percent of its bound shows so
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
