"""The compiled decoding loop writes what the eager engine writes, and is used only where it fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cllm.core.errors import UserError
from cllm.infer import native
from cllm.infer.batching import Request, serve
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.native import compile_library, load_native, obstacle
from cllm.infer.request import BURST, NonFiniteLogitsError
from cllm.infer.sampling import Sampling
from cllm.model.transformer import Transformer

Make = Callable[..., Transformer]
FIT = {"d_model": 64, "d_ff": 48, "n_heads": 4, "context": 12, "vocab_size": 45}


@pytest.fixture
def engine_of(library: Path, model_of: Make, isolated: Path) -> Callable[..., Engine]:
    """Makes an engine with the compiled loop, on as many threads as asked."""

    def make(slots: int = 3, threads: int = 1, **fields: object) -> Engine:
        model = model_of(**FIT | fields).float().eval()
        torch.set_num_threads(threads)
        try:
            engine = Engine(model, EngineOptions(slots=slots))
            engine.native, line = load_native(engine)
            assert engine.native is not None, line
            engine.native.threads = threads
        finally:
            torch.set_num_threads(1)
        return engine

    return make


def _logits(engine: Engine) -> torch.Tensor:
    """Of nine texts of 1 to 25 tokens, and of four steps after them."""
    rows = [engine.start(slot, [slot + 1] * (3 * slot + 1)).logits[0] for slot in range(9)]
    for number in range(4):
        scores = engine.step({slot: (7 * number + slot) % 45 for slot in range(9)})
        rows += list(scores.logits.clone())
    return torch.stack(rows)


@pytest.mark.parametrize("head", [32, 48, 64])
def test_heads_of_every_width_and_more_slots_than_a_panel_holds_rows(
    head: int, engine_of: Callable[..., Engine], model_of: Make
) -> None:
    """It is as far from float64 as the eager engine is: weights this large amplify all rounding."""
    shape = {"d_model": 3 * head, "n_heads": 3, "n_kv_heads": 1, "d_ff": 80, "context": 24}
    engine = engine_of(slots=9, **shape)
    truth = Engine(model_of(**FIT | shape).eval(), EngineOptions(slots=9))
    requests = [
        Request([1 + n, *range(2 * n)], Sampling(max_tokens=30, temperature=0.0)) for n in range(12)
    ]
    logits, found = [_logits(truth)], []
    for wanted in (False, True):
        engine.use_compiled(wanted)
        logits.append(_logits(engine))
        found.append([(s.index, s.token) for s in serve(engine, requests)])
    exact, eager, compiled = logits
    assert exact.dtype == torch.float64
    assert float(exact.std()) > 1.0
    errors = [(made - exact).abs() for made in (eager, compiled)]
    assert float(errors[1].square().mean()) <= 4 * float(errors[0].square().mean())
    assert float(errors[1].max()) <= 4 * float(errors[0].max())
    for index in range(12):
        assert [s for s in found[0] if s[0] == index] == [s for s in found[1] if s[0] == index]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_kv_heads": 2},
        {"tie_embeddings": False},
        {"embedding": {"kind": "reduced", "rank": 8}},
    ],
    ids=str,
)
def test_logits_are_the_eager_ones(
    fields: dict, threads: int, engine_of: Callable[..., Engine]
) -> None:
    engine = engine_of(threads=threads, **fields)
    found = []
    for wanted in (False, True):
        engine.use_compiled(wanted)
        rows = []
        for slot, ids in enumerate([[1], [2, 3, 4, 5, 6], list(range(20))]):
            rows.append(engine.start(slot, ids).logits[0])
        for number in range(20):  # past the context of 12
            given = {
                slot: (7 * number + slot) % 45 for slot in range(3) if (number + slot) % 5 or 1
            }
            scores = engine.step(given)
            rows += [scores.logits[slot].clone() for slot in given]
            assert scores.best == scores.logits.argmax(-1).tolist()
        found.append(torch.stack(rows))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)
    assert float(found[0].std()) > 0.1


@pytest.mark.parametrize("threads", [1, 2])
def test_company_changes_no_bit(threads: int, engine_of: Callable[..., Engine]) -> None:
    """One to fourteen texts at once, by one thread or two, and read at once or token by token: each sum is
    added up in one order."""
    engine = engine_of(slots=14, threads=threads, d_model=48, d_ff=112, n_heads=3, vocab_size=131)
    engine.use_compiled(True)
    native = engine.native
    assert native is not None
    texts = [[slot + 1, 5, 9, slot + 3] for slot in range(14)]

    def logits_of(slots: list[int]) -> dict[int, torch.Tensor]:
        for slot in slots:
            native.read(slot, texts[slot])
        _, found, _ = native.write({slot: 7 + slot for slot in slots}, [4] * len(slots), 3)
        return {slot: torch.from_numpy(found[row].copy()) for row, slot in enumerate(slots)}

    native.threads = 1
    alone = {slot: logits_of([slot])[slot] for slot in range(14)}
    native.threads = threads
    for count in range(2, 15):
        for slot, row in logits_of(list(range(14 - count, 14))).items():
            assert torch.equal(row, alone[slot]), (count, slot)
    whole = torch.from_numpy(native.read(0, [3, 1, 4, 1, 5])[0].copy())
    for place, token in enumerate([3, 1, 4, 1, 5]):
        _, found, _ = native.write({1: token}, [place])
    assert torch.equal(whole[0], torch.from_numpy(found[0]))


SAMPLINGS = [
    Sampling(max_tokens=40, temperature=0.0),
    Sampling(max_tokens=40, seed=1),
    Sampling(max_tokens=40, top_k=5, seed=2),
    Sampling(max_tokens=40, top_k=2**64 + 1, seed=2),
    Sampling(max_tokens=40, temperature=5e-324, seed=2),
    Sampling(max_tokens=40, top_k=0, top_p=0.7, seed=3),
    Sampling(max_tokens=40, top_k=0, temperature=1.5, min_p=0.05, seed=4),
    Sampling(max_tokens=40, top_k=20, top_p=0.8, min_p=0.02, seed=5),
]


def test_texts_are_the_eager_ones_whatever_is_drawn(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(context=64)
    stopped = Request([3], Sampling(max_tokens=40, temperature=0.0), lambda token: token % 7 == 0)
    requests = [Request([n + 1, 5], s) for n, s in enumerate(SAMPLINGS)] + [stopped]
    found, bursts = [], []
    write = Engine.write
    for wanted in (False, True):
        engine.use_compiled(wanted)
        engine.write = lambda *a: bursts.append(a[1]) or write(engine, *a)  # type: ignore[method-assign]
        found.append([(s.index, s.token, s.reason) for s in serve(engine, requests, end_id=9)])
    for index in range(len(requests)):
        assert [s for s in found[0] if s[0] == index] == [s for s in found[1] if s[0] == index]
    assert max(bursts) == BURST
    assert {s[2] for s in found[1]} >= {"length", "stop"}


def test_what_is_asked_of_each_token_goes_step_by_step(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(slots=1)
    engine.write = None  # type: ignore[method-assign, assignment]
    wanted = [Sampling(max_tokens=5, logprobs=2), Sampling(max_tokens=5, repetition_penalty=1.3)]
    found = []
    for compiled in (False, True):
        engine.use_compiled(compiled)
        found.append(list(serve(engine, [Request([1, 2], s) for s in wanted])))
    assert [s.token for s in found[0]] == [s.token for s in found[1]]
    for one, other in zip(*found, strict=True):
        assert (one.logprob is None) == (other.logprob is None)
        assert one.logprob is None or math.isclose(one.logprob, other.logprob or 0, abs_tol=1e-3)


def test_a_damaged_weight_or_cache_is_noticed(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(slots=2)
    engine.use_compiled(True)
    engine.start(0, [1])
    engine.start(1, [2])
    engine.cache.buffers[0][1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteLogitsError):
        engine.step({0: 3, 1: 4})
    with pytest.raises(NonFiniteLogitsError):
        engine.write({0: 3, 1: 4}, 3, SAMPLINGS[:2], [0.5] * 6, None)
    engine.network.table[7, 0] = float("inf")
    with pytest.raises(NonFiniteLogitsError):
        engine.start(0, [7])


def test_other_models_and_options_are_not_for_it(
    library: Path, model_of: Make, isolated: Path
) -> None:
    def why(fields: dict, **options: str) -> str:
        engine = Engine(model_of(**FIT | fields).float().eval(), EngineOptions(**options))
        reason = obstacle(engine.network, engine.options)
        assert (load_native(engine)[0] is None) or not reason
        return reason

    assert why({}) == ""
    assert why({"norm": "layernorm"}) == "model.norm layernorm"
    assert why({"mlp": "gelu"}) == "model.mlp gelu"
    assert why({"positions": "learned"}) == "positions learned"
    assert why({"n_heads": 8}) == "heads of 8 numbers"
    assert why({"d_ff": 24}) == "d_ff of 24"
    assert why({}, weights="bf16") == "weights bf16"
    assert why({}, cache="int8") == "a cache of int8"
    double = Engine(model_of(**FIT).double().eval())
    assert obstacle(double.network, double.options) == "torch.float64 on cpu"


def test_memory_or_threads_that_are_refused_leave_the_eager_step(
    library: Path, model_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model_of(**FIT).float().eval())
    monkeypatch.setattr("cllm.infer.native.torch.get_num_threads", lambda: 2**40)
    made, line = load_native(engine)
    assert made is None
    assert "cannot be loaded (no memory, or no 1099511627776 threads, for it): not used" in line


def test_without_a_compiler_it_says_so_and_nothing_is_loaded(
    model_of: Make, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no C\\+\\+ compiler no-such-compiler \\(install one"):
        compile_library()
    assert load_native(Engine(model_of(**FIT).float().eval())) == (None, "")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(
        UserError, match="decoding library cannot be compiled: false failed: no message"
    ):
        compile_library()
    assert not native.library().path().exists()
