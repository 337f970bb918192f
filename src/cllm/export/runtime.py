"""The program that an exported file is for, as checks and scores call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Runtime:
    """An exported file, opened by the program that it is for."""

    name: str
    """The program and its version."""
    logits: Callable[[np.ndarray], np.ndarray]
    """(B, T) int64 ids to (B, T, V) float32 logits."""
    encode: Callable[[str], list[int]] | None = None
    """Text to ids as the file's own tokenizer makes them, the end token that begins a text included;
    none where the file holds no tokenizer."""
    stepwise: Callable[[list[np.ndarray]], list[np.ndarray]] | None = None
    """The same by a cache: ids (B, T) piece by piece to the logits of each piece; none without one."""
    close: Callable[[], None] = lambda: None
    """Let go of it."""
    exact: bool = True
    """Whether the arithmetic is float32 on the weights as they are stored; else activations are rounded
    too, and logits are near rather than equal."""
