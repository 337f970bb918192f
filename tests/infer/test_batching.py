"""Continuous batching: what a request is given depends on itself alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from cllm.infer.batching import Request, Step, serve
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.sampling import Sampling
from cllm.model.transformer import Transformer

Make = Callable[..., Transformer]


def requests_of(count: int, **settings: float) -> list[Request]:
    """Requests of different lengths, prompts and seeds."""
    generator = torch.Generator().manual_seed(count)
    made = []
    for number in range(count):
        ids = torch.randint(0, 31, (1 + 5 * number % 17,), generator=generator).tolist()
        sampling = Sampling(max_tokens=3 + 7 * number % 19, seed=number, **settings)  # type: ignore[arg-type]
        made.append(Request(ids, sampling))
    return made


def tokens_of(steps: Iterator[Step]) -> dict[int, list[int]]:
    """The tokens of each request."""
    made: dict[int, list[int]] = {}
    for step in steps:
        if step.token is not None:
            made.setdefault(step.index, []).append(step.token)
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_k": 7, "min_p": 0.05},
        {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_a_request_alone_and_among_others_is_given_the_same(settings: dict, model_of: Make) -> None:
    model, requests = model_of().float().eval(), requests_of(13, **settings)
    together = tokens_of(serve(Engine(model, EngineOptions(slots=4)), requests))
    backwards = tokens_of(serve(Engine(model, EngineOptions(slots=4)), requests[::-1]))
    alone = Engine(model, EngineOptions(slots=4))
    for index, request in enumerate(requests):
        assert len(together[index]) == request.sampling.max_tokens
        assert together[index] == backwards[len(requests) - 1 - index]
        assert together[index] == tokens_of(serve(alone, [request]))[0]


def test_another_number_of_slots_parts_only_where_the_best_two_are_close(model_of: Make) -> None:
    model = model_of().float().eval()
    requests = requests_of(12, temperature=0.0)
    one, five = (tokens_of(serve(Engine(model, EngineOptions(slots=n)), requests)) for n in (1, 5))
    for index, request in enumerate(requests):
        ids = list(request.ids)
        for a, b in zip(one[index], five[index], strict=True):
            if a != b:
                engine = Engine(model)
                best, second = engine.start(0, ids).logits[0].topk(2).values.tolist()
                assert best - second < 1e-3
                break
            ids.append(a)
    assert len(one) == len(five) == 12


def test_slots_are_freed_and_filled_again_and_requests_taken_when_needed(model_of: Make) -> None:
    taken = []

    def requests() -> Iterator[Request]:
        for number, request in enumerate(requests_of(9)):
            taken.append(number)
            yield request

    steps = serve(Engine(model_of(), EngineOptions(slots=2)), requests())
    next(steps)
    assert taken == [0]
    ends = [step for step in steps if step.token is None]
    assert taken == list(range(9))
    assert sorted(step.index for step in ends) == list(range(9))
    assert {step.reason for step in ends} == {"length"}


def test_reasons_tell_why_a_request_ended(model_of: Make) -> None:
    engine = Engine(model_of())
    made = tokens_of(serve(engine, [Request([1], Sampling(temperature=0, max_tokens=8))]))[0]
    end, stop = made[3], made[2]
    first = made.index(end)
    steps = list(serve(engine, [Request([1], Sampling(temperature=0, max_tokens=8))], end_id=end))
    assert [step.token for step in steps] == [*made[:first], None]
    assert steps[-1].reason == "end"
    (*before, last) = serve(
        engine, [Request([1], Sampling(temperature=0, max_tokens=8), done=lambda t: t == stop)]
    )
    assert last.reason == "stop"
    assert [step.token for step in before] == made[: made.index(stop) + 1]


def test_the_penalty_does_not_count_the_end_token_that_a_text_begins_after(model_of: Make) -> None:
    model = model_of().eval()
    pairs = torch.cartesian_prod(torch.arange(31), torch.arange(31))
    with torch.no_grad():
        best = model(pairs)[:, -1].max(-1)
    likely = pairs[(best.indices == pairs[:, 0]) & (best.values > 0)]
    assert len(likely), "no pair is followed by its first"
    ids = likely[0].tolist()
    sampling = Sampling(max_tokens=1, temperature=0, repetition_penalty=1e6)
    step, *_ = serve(Engine(model), [Request(ids, sampling)])
    assert step.token not in ids
    step, *_ = serve(Engine(model), [Request(ids, sampling)], end_id=ids[0])
    assert step.reason == "end"


def test_logprobs_are_the_models_own(model_of: Make) -> None:
    model = model_of().eval()
    sampling = Sampling(max_tokens=6, temperature=2.0, repetition_penalty=1.5, logprobs=3)
    ids = [4, 5]
    for step in serve(Engine(model), [Request(ids, sampling)]):
        if step.token is None:
            break
        with torch.no_grad():
            wanted = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        assert step.logprob == pytest.approx(float(wanted[step.token]))
        best = wanted.topk(3)
        assert [token for token, _ in step.top] == best.indices.tolist()
        assert [value for _, value in step.top] == pytest.approx(best.values.tolist())
        ids = [*ids, step.token]
    assert len(ids) == 8
