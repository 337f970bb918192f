"""Continuous batching: requests share an engine's slots, and a slot that is freed takes the next one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from cllm.core.errors import UsageError
from cllm.infer.engine import Engine
from cllm.infer.request import BURST, Sampling
from cllm.infer.sampling import choose_tokens, penalised, uniform

if TYPE_CHECKING:  # an index brings scipy along, which generation seldom needs
    from cllm.infer.lookup.head import IndexHead


class Constraint(Protocol):
    """What a text must match, followed token by token (see ``cllm.infer.constrain``)."""

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next."""

    def accept(self, token: int) -> bool:
        """Take a token; True when the text is complete, so that nothing may follow."""


@dataclass(frozen=True)
class Request:
    """A text to go on from, and how."""

    ids: Sequence[int]
    sampling: Sampling
    done: Callable[[int], bool] = lambda token: False
    """Called with each token; True ends the request (a stop string was found)."""
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A token of a request, or its end (``token`` is None). ``index`` counts requests from 0.

    ``reason`` of an end: ``length`` (all tokens made), ``end`` (the model ended the text), ``stop`` (the
    request's ``done`` said so), ``complete`` (its constraint allows nothing more). Log-probabilities are
    the model's own, in nats, before temperature, penalty and constraint.
    """

    index: int
    token: int | None = None
    reason: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class _Live:
    """A request in a slot."""

    index: int
    request: Request
    generator: torch.Generator
    seen: set[int] = field(default_factory=set)
    made: int = 0
    last: int = 0
    over: bool = False

    @property
    def left(self) -> int:
        """Tokens that may still be made."""
        return self.request.sampling.max_tokens - self.made

    @property
    def is_plain(self) -> bool:
        """Whether its tokens depend on the logits alone, and nothing is asked about them."""
        sampling = self.request.sampling
        return (
            self.request.constraint is None
            and sampling.repetition_penalty == 1
            and sampling.logprobs is None
        )


def serve(
    engine: Engine,
    requests: Iterable[Request],
    *,
    end_id: int | None = None,
) -> Iterator[Step]:
    """Continue all ``requests``, as many at once as the engine has slots; tokens come as they are made.

    A request is taken from the iterable when a slot is free for it. What it is given depends on its own
    ids and sampling and not on its neighbours, but for rounding where rows of a product are not computed
    alike. Raises ``UserError`` for a request without tokens, ``NonFiniteLogitsError``, and ``UsageError``
    where the engine is still at other requests.
    """
    with engine.taken():
        yield from _serve(engine, requests, end_id)


def _serve(engine: Engine, requests: Iterable[Request], end_id: int | None) -> Iterator[Step]:
    head = engine.head
    waiting = enumerate(requests if head is None else map(_fitting, requests))
    live: dict[int, _Live] = {}
    more = True
    while True:
        for slot in range(engine.options.slots):
            while more and slot not in live:
                taken = next(waiting, None)
                if taken is None:
                    more = False
                    break
                one = _begin(*taken, end_id)
                scores = engine.start(slot, one.request.ids)
                yield from _advance([one], scores.logits, scores.best, end_id, engine)
                if not one.over:
                    live[slot] = one
        if not live:
            return
        steps = min(BURST, engine.room(live), *(one.left for one in live.values()))
        if steps > 1 and all(one.is_plain for one in live.values()):
            yield from _burst(engine, live, steps, end_id)
            live = {slot: one for slot, one in live.items() if not one.over}
            continue
        scores = engine.step({slot: one.last for slot, one in live.items()})
        slots = sorted(live)
        ones = [live[slot] for slot in slots]
        logits = scores.logits if len(slots) == len(scores.logits) else scores.logits[slots]
        yield from _advance(ones, logits, [scores.best[slot] for slot in slots], end_id, engine)
        live = {slot: one for slot, one in live.items() if not one.over}


def _burst(
    engine: Engine, live: dict[int, _Live], steps: int, end_id: int | None
) -> Iterator[Step]:
    """``steps`` tokens for each of ``live`` in one call; those behind a stop text are thrown away."""
    ones = list(live.values())
    numbers = [
        [0.0 if one.request.sampling.is_greedy else uniform(one.generator) for _ in range(steps)]
        for one in ones
    ]
    made = engine.write(
        {slot: one.last for slot, one in live.items()},
        steps,
        [one.request.sampling for one in ones],
        [row[step] for step in range(steps) for row in numbers],
        end_id,
    )
    for step in range(steps):
        for one, tokens in zip(ones, made, strict=True):
            if not one.over and step < len(tokens):
                yield from _take(one, tokens[step], end_id)


def _take(one: _Live, token: int, end_id: int | None) -> Iterator[Step]:
    """Note a token of a plain request, and what it means."""
    if token == end_id:
        one.over = True
        yield Step(one.index, reason="end")
        return
    one.last = token
    one.made += 1
    yield Step(one.index, token)
    reason = _end_of(one, token)
    if reason:
        one.over = True
        yield Step(one.index, reason=reason)


def _fitting(request: Request) -> Request:
    check_for_head(request.sampling, request.constraint is not None)
    return request


def check_for_head(sampling: Sampling, has_form: bool) -> None:
    """Raises ``UsageError`` if a request asks what takes the logits of all tokens."""
    if sampling.temperature > 0 and sampling.top_k == 0:
        raise UsageError("an index as output head needs top_k of at least 1, or temperature 0")
    if sampling.repetition_penalty != 1 or sampling.logprobs is not None or has_form:
        raise UsageError(
            "an index as output head knows no log-probabilities, repetition penalty or format; leave them "
            "out, or the index"
        )


def _begin(index: int, request: Request, end_id: int | None) -> _Live:
    generator = torch.Generator().manual_seed(request.sampling.seed)
    penalised = request.sampling.repetition_penalty != 1
    # The end token that a text begins after is not part of it: its end is not to become less likely.
    return _Live(index, request, generator, set(request.ids) - {end_id} if penalised else set())


def _advance(
    ones: Sequence[_Live],
    logits_nv: Tensor,
    best: Sequence[int],
    end_id: int | None,
    engine: Engine,
) -> Iterator[Step]:
    """Choose a token for each of ``ones`` and note what it means."""
    known = logits_nv if engine.head is not None else logits_nv[:, : engine.tokens]
    for row, token in enumerate(_choose(ones, known, best, engine.head)):
        one = ones[row]
        if token == end_id:
            one.over = True
            yield Step(one.index, reason="end")
            continue
        one.last = token
        one.made += 1
        if one.request.sampling.repetition_penalty != 1:
            one.seen.add(token)
        if one.request.sampling.logprobs is None:
            yield Step(one.index, token)
        else:
            yield _with_logprobs(one, token, logits_nv[row], engine.tokens)
        reason = _end_of(one, token)
        if reason:
            one.over = True
            yield Step(one.index, reason=reason)


def _end_of(one: _Live, token: int) -> str:
    """Why a request ends behind ``token``; empty if it goes on."""
    request = one.request
    complete = request.constraint is not None and request.constraint.accept(token)
    if request.done(token):
        return "stop"
    if complete:
        return "complete"
    return "length" if one.made >= request.sampling.max_tokens else ""


def _choose(
    ones: Sequence[_Live], logits_nv: Tensor, best: Sequence[int], head: IndexHead | None
) -> list[int]:
    """A token for each; rows that are drawn alike are drawn together."""
    chosen = list(best)
    alike: dict[Sampling, list[int]] = defaultdict(list)
    for row, one in enumerate(ones):
        sampling = one.request.sampling
        if head is not None:
            chosen[row] = head.choose(logits_nv[row], sampling, one.generator)
        elif not sampling.takes_likeliest or one.request.constraint is not None:
            # What is the same for all tokens of a request decides nothing here.
            alike[replace(sampling, seed=0, max_tokens=1, stop=(), logprobs=None)].append(row)
    for sampling, rows in alike.items():
        logits = logits_nv if len(rows) == len(logits_nv) else logits_nv[rows]
        logits = penalised(logits, sampling, [ones[row].seen for row in rows])
        for place, row in enumerate(rows):
            constraint = ones[row].request.constraint
            if constraint is not None:
                allowed = constraint.allowed()
                logits = logits.clone()
                logits[place, len(allowed) :] = float("-inf")  # rows that no token has
                logits[place, : len(allowed)][~allowed] = float("-inf")
        numbers = [0.0 if sampling.is_greedy else uniform(ones[row].generator) for row in rows]
        for row, token in zip(rows, choose_tokens(logits, sampling, numbers), strict=True):
            chosen[row] = token
    return chosen


def _with_logprobs(one: _Live, token: int, logits_v: Tensor, known: int) -> Step:
    """Shares of all rows of the table, those of the ``known`` tokens told."""
    logprobs = torch.log_softmax(logits_v.double(), -1)[:known]
    top = logprobs.topk(min(one.request.sampling.logprobs or 0, len(logprobs)))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Step(one.index, token, logprob=float(logprobs[token]), top=pairs)
