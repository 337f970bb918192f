"""Text that a model made, on a person's terminal."""

from __future__ import annotations

import sys
import unicodedata


def printable(text: str) -> str:
    """``text`` with control characters shown as U+FFFD if a terminal would obey them; else as it is."""
    if not sys.stdout.isatty():
        return text
    return "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )
