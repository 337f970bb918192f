"""The engine behind generation: slots of a cache, read in one pass and continued by one or more tokens."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cllm.core.errors import UsageError, UserError
from cllm.infer.cache import Cache
from cllm.infer.native import Native
from cllm.infer.network import Network
from cllm.infer.request import Sampling, refuse_unless
from cllm.infer.stored import Integers
from cllm.infer.weights import check_weights
from cllm.model.transformer import Transformer

if TYPE_CHECKING:  # an index brings scipy along, which generation seldom needs
    from cllm.infer.lookup.head import IndexHead

Decode = Callable[[list[Tensor]], Sequence[Tensor]]
"""``Network.decode`` or what it was compiled to: (tokens, positions, *buffers) in a list."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine computes.

    ``slots``: texts that are continued at once. ``weights``: see ``cllm.infer.weights``. ``cache``: see
    ``cllm.infer.cache``. ``capacity``: tokens that a slot holds, at most the model's context; none means
    all of it. ``tokens``: how many the tokenizer has, of which alone one is chosen; none means all rows of
    the model's table.
    """

    slots: int = 1
    weights: str = "fp32"
    cache: str = "fp32"
    capacity: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise UsageError(f"slots = {self.slots} must be at least 1")
        check_weights(self.weights)

    def capacity_of(self, model: Transformer) -> int:
        """The capacity for ``model``; ``UsageError`` if its context has no room for it."""
        context = model.config.context
        if self.capacity is None:
            return context
        if not 1 <= self.capacity <= context:
            raise UsageError(f"capacity = {self.capacity} must be in 1…{context}, the context")
        return self.capacity

    def tokens_of(self, model: Transformer) -> int:
        """The tokens of ``model`` that may be chosen; the rest of its table only takes its share of the
        probability."""
        rows = model.config.vocab_size
        assert rows is not None
        return rows if self.tokens is None else min(self.tokens, rows)


@dataclass(frozen=True)
class Scores:
    """Logits (S, V) after a step, and the likeliest token of each slot among those that may be chosen."""

    logits: Tensor
    best: list[int]


class Engine:
    """A model with a cache of fixed size.

    A slot whose cache is full is read anew from the second half of what it holds, in one pass. So logits
    are always those of a plain forward over the tokens that the cache holds, at positions that the model
    was trained on. ``head`` stands in for the output table: logits are then hidden vectors, for it to read.
    ``integers``: those of a compressed file (``cllm.infer.stored``).
    """

    def __init__(
        self,
        model: Transformer,
        options: EngineOptions | None = None,
        *,
        head: IndexHead | None = None,
        integers: Integers | None = None,
    ) -> None:
        options = options or EngineOptions()
        self._model, self.head = model, head
        self.options, self.capacity = options, options.capacity_of(model)
        self.tokens = options.tokens_of(model)
        self.network = Network(
            model,
            options.weights,
            options.cache,
            scored=head is None,
            tokens=self.tokens,
            integers=integers,
        ).eval()
        self.device = self.network.table.device
        self.cache = Cache(
            model.config, options.slots, self.capacity, options.cache, self.network.gain
        )
        self.compiled: Decode | None = None
        """What the decode step was compiled to (``cllm.infer.artifact``)."""
        self.native: Native | None = None
        """The compiled loop for this model, where there is one (``cllm.infer.native``)."""
        self._native: Native | None = None
        self._decode: Decode = self._eager
        self._seen: list[list[int]] = [[] for _ in range(options.slots)]
        self._lengths = [0] * options.slots
        self._taken = threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold all slots: whoever else wrote into them meanwhile would spoil both texts.

        Raises ``UsageError`` where someone holds them already.
        """
        if not self._taken.acquire(blocking=False):
            raise UsageError(
                "this engine is writing another text: finish or close that one first, or take a second "
                "engine (number=1)"
            )
        try:
            yield
        finally:
            self._taken.release()

    @property
    def is_taken(self) -> bool:
        """Whether someone holds the slots."""
        return self._taken.locked()

    def use_compiled(self, wanted: bool) -> None:
        """Decode by ``native`` or ``compiled``, where there is such a step and it is ``wanted``."""
        self._native = self.native if wanted else None
        self._decode = self.compiled if wanted and self.compiled else self._eager

    def fingerprint(self) -> str:
        """A hash of the model's shape and of all its numbers."""
        digest = hashlib.sha256(self.network.config.model_dump_json().encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(memoryview(numbers.numpy()))
        return digest.hexdigest()

    def held(self, slot: int) -> list[int]:
        """The tokens that the cache of a slot holds."""
        return self._seen[slot][len(self._seen[slot]) - self._lengths[slot] :]

    def start(self, slot: int, ids: Sequence[int]) -> Scores:
        """Begin a text in a slot; of a long one its last ``capacity`` tokens are read. Scores of one row.

        Raises ``UserError`` for no tokens and ``NonFiniteLogitsError``.
        """
        if not len(ids):
            raise UserError(
                "the prompt has no tokens; give at least one (the end token begins a text)"
            )
        self._seen[slot] = list(ids)
        return self._read(slot, self.capacity)

    @torch.no_grad()
    def step(self, tokens: Mapping[int, int]) -> Scores:
        """Append a token to each slot named, and score what may come next (rows of others mean nothing).

        A slot that was started and is not named is given up: it must be started again.
        """
        full = [slot for slot in tokens if self._lengths[slot] == self.capacity]
        for slot, token in tokens.items():
            self._seen[slot].append(token)
        logits: Tensor | None = None
        best = [0] * self.options.slots
        if len(full) < len(tokens):
            ids, places = [0] * self.options.slots, [0] * self.options.slots
            going = [slot for slot in tokens if self._lengths[slot] < self.capacity]
            if self._native is not None and self._native.scores_all:
                return self._native_step(tokens, going, full)
            for slot in going:
                ids[slot], places[slot] = tokens[slot], self._lengths[slot]
                self._lengths[slot] += 1
            given = [
                torch.tensor(ids, device=self.device),
                torch.tensor(places, device=self.device),
            ]
            logits, likeliest, total = self._decode([*given, *self.cache.buffers])
            best, sums = likeliest.tolist(), total.tolist()
            _refuse_damaged(sums[slot] for slot in going)
        for slot in full:
            scores = self._read(slot, max(self.capacity // 2, 1))
            if logits is None:
                logits = scores.logits.new_zeros((self.options.slots, scores.logits.shape[1]))
            logits[slot], best[slot] = scores.logits[0], scores.best[0]
        assert logits is not None, "a step of no slots"
        return Scores(logits, best)

    def room(self, slots: Iterable[int]) -> int:
        """How many tokens ``write`` may write after each of ``slots``; 0 without a compiled loop."""
        if self._native is None:
            return 0
        return min(self.capacity - self._lengths[slot] for slot in slots)

    def write(
        self,
        tokens: Mapping[int, int],
        steps: int,
        draws: Sequence[Sampling],
        uniforms: Sequence[float],
        end_id: int | None,
    ) -> list[list[int]]:
        """Append a token to each slot and write ``steps`` more after it, at most ``room``, in one call.

        ``draws`` and ``uniforms`` as ``Native.write`` has them. Returns the tokens written after each, up
        to ``end_id``; the last of them is not in the cache, as after ``step``. Raises
        ``NonFiniteLogitsError``.
        """
        native = self._native
        assert native is not None
        assert 1 <= steps <= self.room(tokens)
        places = [self._lengths[slot] for slot in tokens]
        made, _, finite = native.write(dict(tokens), places, steps, draws, uniforms, end_id)
        refuse_unless(finite)
        for (slot, token), following in zip(tokens.items(), made, strict=True):
            self._seen[slot] += [token, *following[:-1]]
            self._lengths[slot] += len(following)
        return made

    def _native_step(
        self, tokens: Mapping[int, int], going: Sequence[int], full: Sequence[int]
    ) -> Scores:
        assert self._native is not None
        given = {slot: tokens[slot] for slot in going}
        places = [self._lengths[slot] for slot in going]
        made, rows, finite = self._native.step(given, places)
        refuse_unless(finite)
        best, logits = [0] * self.options.slots, rows.new_zeros(self.options.slots, rows.shape[1])
        logits[list(going)] = rows
        for slot, (token,) in zip(going, made, strict=True):
            self._lengths[slot] += 1
            best[slot] = token
        for slot in full:
            scores = self._read(slot, max(self.capacity // 2, 1))
            logits[slot], best[slot] = scores.logits[0], scores.best[0]
        return Scores(logits, best)

    @torch.no_grad()
    def _read(self, slot: int, most: int) -> Scores:
        ids = self._seen[slot][-most:]
        self._lengths[slot] = len(ids)
        del self._seen[slot][: -self.capacity]
        if self._native is not None and self._native.scores_all:
            logits, best, finite = self._native.scores_of(slot, ids)
            refuse_unless(finite)
            return Scores(logits, [best])
        given = torch.tensor(ids, device=self.device)
        logits = self.network.logits(self.network.read(given, slot, *self.cache.buffers)[-1:])
        _refuse_damaged(logits.sum(-1).tolist())
        return Scores(logits, logits[:, : self.network.tokens].argmax(-1).tolist())

    @torch.no_grad()
    def _eager(self, given: list[Tensor]) -> Sequence[Tensor]:
        return self.network.decode(*given)


def _refuse_damaged(sums: Iterable[float]) -> None:
    refuse_unless(all(map(math.isfinite, sums)))
