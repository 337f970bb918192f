"""Batches of a packed split: which windows, in which order, computed from (seed, epoch, step) alone.

Nothing is stored and nothing is replayed: batch 1,000,000 costs what batch 0 costs, so that a resumed
run reads exactly what it would have read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from cllm.core.errors import UserError
from cllm.text.hashing import derive
from cllm.text.packed import PackedTokens
from cllm.text.permutation import permute

IGNORED = -100
"""The target that a loss leaves out, as in torch's ``cross_entropy``."""
_BLOCK = 1024  # positions permuted at once: the cost per batch falls to that of a look-up


class BatchSource:
    """Training batches without end: epoch after epoch, each a permutation of its windows.

    The stream is read as a circle, whose seam is an end token like any other: N tokens make
    ``(N - 1) // context`` disjoint windows. Each epoch turns the grid of windows by an offset of its
    own, so the edges of windows differ between epochs, and so do the at most ``context - 1`` targets
    that no window of the epoch holds.
    """

    def __init__(self, tokens: PackedTokens, context: int, batch_size: int, seed: int) -> None:
        """Raises ``UserError`` if the split is shorter than one window of ``context`` tokens."""
        assert min(context, batch_size) >= 1
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        self._circle = len(tokens) - 1
        self.windows_per_epoch = self._circle // context
        if not self.windows_per_epoch:
            raise UserError(
                f"the training text has {self._circle:,} tokens, fewer than one context of {context:,}; "
                "give more text or lower model.context"
            )
        self._block = lru_cache(maxsize=2)(self._permuted_block)

    def epoch(self, index: int) -> float:
        """Epochs (with fraction) that are over when batch ``index`` begins."""
        return index * self.batch_size / self.windows_per_epoch

    def offset(self, epoch: int) -> int:
        """Position of the first window of an epoch on the circle."""
        return derive("offset", self.seed, epoch) % self._circle

    def starts(self, index: int) -> np.ndarray:
        """(batch,) int64: positions on the circle where the windows of micro-batch ``index`` begin."""
        place, left = index * self.batch_size, self.batch_size
        parts = list[np.ndarray]()
        while left:
            epoch, within = divmod(place, self.windows_per_epoch)
            part = self._block(epoch, within // _BLOCK)[within % _BLOCK :][:left]
            parts.append(part)
            place, left = place + len(part), left - len(part)
        return np.concatenate(parts)

    def batch(
        self, index: int, out: tuple[np.ndarray, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Micro-batch ``index`` (0, 1, 2, …): inputs and targets, (batch, context) int64.

        Targets are the inputs moved on by one; -100 where the loss does not count. ``out``: arrays of that
        shape to write them into.
        """
        assert index >= 0
        if out is None:
            shape = (self.batch_size, self.context)
            out = np.empty(shape, np.int64), np.empty(shape, np.int64)
        inputs, targets = out
        places = self.starts(index)[:, None] + np.arange(self.context)
        inputs[:] = self.tokens.ids[places % self._circle]
        # The circle's last target is the closing end token, which stands where the first input does.
        following = places % self._circle + 1
        targets[:] = self.tokens.ids[following]
        if self.tokens.mask_bits is not None:
            targets[~self.tokens.counts(following)] = IGNORED
        return inputs, targets

    def _permuted_block(self, epoch: int, number: int) -> np.ndarray:
        """Starts of the windows at places [number, number + 1) × _BLOCK of an epoch's order."""
        first = number * _BLOCK
        places = np.arange(first, min(first + _BLOCK, self.windows_per_epoch))
        windows = permute(places, self.windows_per_epoch, self.seed, epoch)
        return (windows * self.context + self.offset(epoch)) % self._circle


def evaluation_batches(tokens: PackedTokens, context: int, batch_size: int) -> int:
    """How many batches ``evaluation_windows`` yields."""
    windows = -(-(len(tokens) - 1) // context)
    return -(-windows // batch_size)


def evaluation_windows(
    tokens: PackedTokens, context: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Disjoint windows in order, (batch, context) int64 inputs and targets.

    Every token but the first is a target exactly once (or -100 where the loss does not count). All
    batches have the same shape: what is missing at the end has the end token as input and -100 as
    target.
    """
    targets_left = len(tokens) - 1
    end_id = int(tokens.ids[0])
    for first in range(0, targets_left, context * batch_size):
        count = min(context * batch_size, targets_left - first)
        inputs = np.full(context * batch_size, end_id, dtype=np.int64)
        targets = np.full(context * batch_size, IGNORED, dtype=np.int64)
        inputs[:count] = tokens.ids[first : first + count]
        targets[:count] = tokens.ids[first + 1 : first + 1 + count]
        if tokens.mask_bits is not None:
            counted = tokens.counts(np.arange(first + 1, first + 1 + count))
            targets[:count][~counted] = IGNORED
        yield inputs.reshape(batch_size, context), targets.reshape(batch_size, context)
