"""The engine's logits against plain forward passes, whatever the model, the weights and the cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cllm.core.errors import UsageError, UserError
from cllm.infer.cache import Cache, encode
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.generate import generate
from cllm.infer.measure import CHOICES, fastest_weights
from cllm.infer.request import NonFiniteLogitsError
from cllm.infer.sampling import Sampling
from cllm.infer.weights import GROUP, WEIGHTS, Int8, pack
from cllm.model.norms import BatchNorm
from cllm.model.transformer import Transformer

Make = Callable[..., Transformer]
MODELS = [
    {},
    {"n_kv_heads": 2},
    {"positions": "learned", "mlp": "gelu"},
    {"norm": "layernorm"},
    {"norm": "batchnorm"},
    {"tie_embeddings": False},
    {"embedding": {"kind": "reduced", "rank": 8}},
]


def plain(model: Transformer, ids: list[int]) -> Tensor:
    """The last logits of a forward pass without any cache."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1]


def stir(model: Transformer) -> Transformer:
    """Running averages as training leaves them, rather than those of a new norm."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            mean = torch.randn(module.running_mean.shape, generator=generator)
            module.running_mean.copy_(mean)
            module.running_square.copy_(mean.square() + mean.abs() + 0.3)
    return model.eval()


@pytest.mark.parametrize("capacity", [None, 7, 1])
@pytest.mark.parametrize("fields", MODELS, ids=str)
def test_logits_are_those_of_a_plain_forward_over_what_the_cache_holds(
    fields: dict, capacity: int | None, model_of: Make
) -> None:
    model = stir(model_of(**fields))
    engine = Engine(model, EngineOptions(slots=3, capacity=capacity))
    texts = [[1], [2, 3, 4, 5, 6], list(range(20))]
    for slot, ids in enumerate(texts):
        assert torch.allclose(engine.start(slot, ids).logits[0], plain(model, engine.held(slot)))
    lengths = set()
    for number in range(30):
        scores = engine.step({slot: (7 * number + slot) % 31 for slot in range(3)})
        for slot in range(3):
            held = engine.held(slot)
            lengths.add(len(held))
            assert held[-1] == (7 * number + slot) % 31
            expected = plain(model, held)
            assert torch.allclose(scores.logits[slot], expected, rtol=1e-9, atol=1e-9)
            assert scores.best[slot] == int(expected.argmax())
    assert max(lengths) == (capacity or 12)


@pytest.mark.parametrize("fields", MODELS[:4], ids=str)
def test_cached_greedy_parts_from_uncached_only_where_the_best_two_are_close(
    fields: dict, model_of: Make
) -> None:
    model = model_of(**fields).float().eval()
    for start in range(8):
        ids = [start]
        for token in generate(model, ids, Sampling(max_tokens=11, temperature=0.0)):
            logits = plain(model, ids)
            best, second = logits.topk(2).values.tolist()
            assert token == int(logits.argmax()) or best - second < 1e-3
            ids.append(token)


@pytest.mark.parametrize(("kind", "error"), [("bf16", 0.05), ("int8", 0.08)])
def test_a_rounded_cache_costs_little(kind: str, error: float, model_of: Make) -> None:
    model = model_of().float().eval()
    exact, rounded = Engine(model), Engine(model, EngineOptions(cache=kind))
    assert rounded.cache.bytes < exact.cache.bytes
    for engine in (exact, rounded):
        engine.start(0, [1, 2, 3])
    for token in range(9):  # no longer than the context: what is read anew is not rounded
        wanted, found = (e.step({0: token}).logits[0] for e in (exact, rounded))
        assert 0 < float((wanted - found).norm() / wanted.norm()) < error


def test_int8_keys_have_a_scale_for_each_position_and_head(model_of: Make) -> None:
    config = model_of().config
    cache = Cache(config, 2, 5, "int8", torch.zeros(1))
    entry = cache.buffers[:2]
    x = torch.randn(2, 4, 5, 4) * torch.tensor([1.0, 1000.0])[:, None, None, None]
    rounded, scale = encode(x, entry)
    assert scale.shape == entry[1].shape
    assert bool(((rounded * scale - x).abs() <= 0.5001 * scale).all())


def matrix(rows: int = 48, width: int = 64) -> tuple[Tensor, Tensor]:
    """A weight and some rows to multiply with it."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.logspace(-2, 2, rows)[:, None]
    weight = torch.randn(rows, width, generator=generator) * scale
    return weight, torch.randn(9, width, generator=generator)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("count", [1, 9])
def test_weights_of_each_kind_multiply_within_their_rounding(kind: str, count: int) -> None:
    weight, x = matrix()
    x = x[:count]
    rows = weight.abs().amax(1)
    groups = weight.view(len(weight), -1, GROUP)
    step = {
        "fp32": 1e-6 * rows,
        "bf16": 2**-7 * rows,  # of the weights and of what they are multiplied with
        "fp16": 2**-10 * rows,
        "int8": rows / 127 / 2,
        # 7 bits for activations, whose range is at most 8 here
        "int8-dynamic": rows / 127 / 2 + rows * 8 / 127,
        "int4": (groups.amax(-1) - groups.amin(-1)).amax(1) / 15 / 2,
    }[kind]
    bound = x.abs().sum(1, keepdim=True) * step * 1.01 + 1e-5
    if kind == "int8-dynamic":
        bound = bound + weight.abs().sum(1) * 8 / 127
    found = pack(weight, kind)(x)
    assert found.dtype == x.dtype
    assert bool(((found - x @ weight.T).abs() <= bound).all())


def test_both_ways_of_int8_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = matrix()
    int8 = Int8.nearest(weight)
    made = []
    for packed in (False, True):
        monkeypatch.setattr("cllm.infer.weights._packed_is_faster", lambda count, p=packed: p)
        made.append(int8(x))
    assert torch.allclose(*made, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "most"), [("bf16", 0.05), ("int8", 0.1), ("int8-dynamic", 0.25), ("int4", 0.6)]
)
def test_a_model_with_rounded_weights_resembles_itself(
    kind: str, most: float, model_of: Make
) -> None:
    model = model_of(d_model=32, d_ff=32, vocab_size=32).float().eval()
    engine = Engine(model, EngineOptions(weights=kind))
    wanted, found = plain(model, [1, 2, 3]), engine.start(0, [1, 2, 3]).logits[0]
    assert 0 < float((wanted - found).norm() / wanted.norm()) < most


def test_auto_takes_what_was_measured_to_be_fastest_and_measures_once(
    isolated: object, model_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of().float().eval()
    monkeypatch.setattr("cllm.infer.measure.is_busy", lambda threads: None)
    seconds = {"fp32": 3.0, "bf16": 1.0, "int8": 2.0}
    asked = []

    def measured(engine: Engine) -> float:
        asked.append(engine.options.weights)
        assert engine.options.slots == 2
        return seconds[engine.options.weights]

    def ready(options: EngineOptions) -> Engine:
        return Engine(model, options)

    monkeypatch.setattr("cllm.infer.measure._step_seconds", measured)
    options = EngineOptions(slots=2)
    for _ in range(2):
        kind, line = fastest_weights(model.config, options, ready, "eager")
        assert kind == "bf16"
        assert "bf16 1000.00 ms" in line
    assert asked == list(CHOICES)
    fastest_weights(model.config, options, ready, "the loop")
    assert asked == 2 * list(CHOICES)


def test_what_cannot_be_is_refused(model_of: Make) -> None:
    model = model_of()
    with pytest.raises(UsageError, match="slots = 0"):
        EngineOptions(slots=0)
    with pytest.raises(UsageError, match=r"weights 'int5' are none of .* \(did you mean 'int"):
        EngineOptions(weights="int5")
    with pytest.raises(UsageError, match="cache 'fp8' is none of"):
        Engine(model, EngineOptions(cache="fp8"))
    with pytest.raises(UsageError, match=r"capacity = 13 must be in 1…12"):
        Engine(model, EngineOptions(capacity=13))
    with pytest.raises(UsageError, match="multiple of 32"):
        Engine(model, EngineOptions(weights="int4"))
    with pytest.raises(UserError, match="no tokens"):
        Engine(model).start(0, [])


def test_one_damaged_number_is_noticed_at_reading_and_at_a_step(model_of: Make) -> None:
    model = model_of().float().eval()
    engine = Engine(model, EngineOptions(slots=2))
    engine.start(0, [1])
    engine.start(1, [2])
    engine.cache.buffers[0][1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteLogitsError):
        engine.step({0: 3, 1: 4})
    model.layers[1].mlp.out.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteLogitsError, match="its weights are damaged"):
        Engine(model).start(0, [1])
