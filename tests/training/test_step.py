"""The training step: its gradient, its accumulation, what it skips, and that it learns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from cllm.model.cross_entropy import IGNORE
from cllm.training.counters import LOSS_SCALE_PATIENCE, LOSS_SCALE_START
from cllm.training.feed import MicroBatches
from cllm.training.step import TrainStep

Steps = Callable[..., TrainStep]
Batches = Callable[..., MicroBatches]

COMPOSED = {"pieces": 31, "nonzeros": 69}
SMOOTH = [
    {},
    {"tie_embeddings": False},
    {"n_kv_heads": 1, "positions": "learned", "mlp": "gelu", "norm": "layernorm"},
    {"norm": "batchnorm"},
    {"embedding": {"kind": "reduced", "rank": 8}},
    {"embedding": {"kind": "composed", **COMPOSED}},
    {"embedding": {"kind": "composed+reduced", "rank": 5, **COMPOSED}, "tie_embeddings": False},
]
SNAPPED = [
    {"embedding": {"lattice": "z"}},
    {"embedding": {"lattice": "e8", "kind": "composed", **COMPOSED}},
    {"embedding": {"lattice": "reduced", "kind": "reduced", "rank": 8}, "tie_embeddings": False},
]
SHAPES = SMOOTH + SNAPPED


def snapshot(step: TrainStep) -> list[torch.Tensor]:
    """Copies of all that a step changes beside its counters."""
    arena, model = step.arena, step.model
    live = [arena.weights, arena.compute, *arena.moments.values(), *model.buffers()]
    return [tensor.clone() for tensor in live]


def mean_loss(step: TrainStep, batches: MicroBatches) -> torch.Tensor:
    """The mean loss over all targets, by torch's own means."""
    logits = [step.model(ids).flatten(0, 1) for ids, _ in batches]
    targets = torch.cat([y.flatten() for _, y in batches])
    return functional.cross_entropy(torch.cat(logits), targets, ignore_index=IGNORE)


@pytest.mark.parametrize("chunk", [0, 1, 5, 16])
@pytest.mark.parametrize("attention", ["matmul", "sdpa"])
@pytest.mark.parametrize("fields", SHAPES)
def test_the_gradient_is_that_of_autograd(
    fields: dict, attention: str, chunk: int, step_of: Steps, batches_of: Batches
) -> None:
    step = step_of(attention=attention, chunk=chunk, **fields)
    batches = batches_of(2, masked=0.5)
    expected = mean_loss(step, batches)
    names = dict(step.model.named_parameters())
    grads = dict(zip(names, torch.autograd.grad(expected, list(names.values())), strict=True))
    loss, flat = step.gradient(batches)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    for name, view in step.arena.layout.views(flat).items():
        torch.testing.assert_close(view, grads[name], rtol=1e-9, atol=1e-15, msg=name)


@pytest.mark.parametrize("fields", SMOOTH)
def test_the_gradient_is_that_of_finite_differences(
    fields: dict, step_of: Steps, batches_of: Batches
) -> None:
    step, batches = step_of(**fields), batches_of(masked=0.3)
    _, flat = step.gradient(batches)
    places = torch.nonzero(flat).flatten()[::97]
    assert len(places) > 20
    for place in places.tolist():
        kept = step.arena.weights[place].item()
        losses = []
        for sign in (1, -1):
            step.arena.weights[place] = kept + sign * 1e-6
            losses.append(mean_loss(step, batches).item())
        step.arena.weights[place] = kept
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(flat[place].item(), abs=1e-8)


@pytest.mark.parametrize("masked", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_batch_of_eight_equals_eight_of_one(
    optimizer: str, masked: float, step_of: Steps, batches_of: Batches
) -> None:
    together = step_of(train={"optimizer": optimizer})
    apart = step_of(train={"optimizer": optimizer})
    for seed in range(5):
        eight = batches_of(8, 1, seed=seed, masked=masked)
        one = (torch.cat([ids for ids, _ in eight]), torch.cat([y for _, y in eight]))
        first, second = together([one], 0.01), apart(eight, 0.01)
        assert second.loss == pytest.approx(first.loss, rel=1e-12)
        assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-12)
    torch.testing.assert_close(together.arena.weights, apart.arena.weights, rtol=1e-12, atol=1e-14)
    assert not torch.equal(apart.arena.weights, step_of().arena.weights)


def test_a_micro_batch_without_targets_adds_nothing(step_of: Steps, batches_of: Batches) -> None:
    plain, padded = step_of(), step_of()
    batch = batches_of()
    nothing = (batch[0][0], torch.full_like(batch[0][1], IGNORE))
    first, second = plain(batch, 0.01), padded([*batch, nothing], 0.01)
    assert second.loss == pytest.approx(first.loss, rel=1e-13)
    torch.testing.assert_close(plain.arena.weights, padded.arena.weights, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_steps_twice_give_the_same_bits(
    dtype: torch.dtype, step_of: Steps, batches_of: Batches
) -> None:
    runs = []
    for _ in range(2):
        step = step_of(dtype=dtype, residual_dropout=0.2)
        torch.manual_seed(8)
        losses = [step(batches_of(2, seed=seed), 0.01).loss for seed in range(4)]
        runs.append((losses, snapshot(step)))
    assert runs[0][0] == runs[1][0]
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fields", [{}, {"norm": "batchnorm"}])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_without_a_trace(
    damage: float,
    optimizer: str,
    fields: dict,
    accumulate: int,
    step_of: Steps,
    batches_of: Batches,
) -> None:
    step = step_of(train={"optimizer": optimizer}, dtype=torch.float32, **fields)
    untouched = step_of(train={"optimizer": optimizer}, dtype=torch.float32, **fields)
    good = [batches_of(accumulate, seed=seed) for seed in range(3)]
    for each in (step, untouched):
        assert each(good[0], 0.01).applied
    before = snapshot(step)
    kept = step.arena.compute[3].item()
    step.arena.compute[3] = damage
    result = step(good[1], 0.01)
    step.arena.compute[3] = kept
    assert not result.applied
    for now, then in zip(snapshot(step), before, strict=True):
        assert torch.equal(now, then)
    assert (step.counters["applied"], step.counters["skipped"], step.counters["in_row"]) == (
        1,
        1,
        1,
    )
    # The next steps are those of a run in which nothing had happened.
    for each in (step, untouched):
        assert each(good[2], 0.01).applied
    for now, then in zip(snapshot(step), snapshot(untouched), strict=True):
        assert torch.equal(now, then)
    assert (step.counters["applied"], step.counters["skipped"], step.counters["in_row"]) == (
        2,
        1,
        0,
    )


def test_fp16_halves_its_loss_scale_on_overflow_and_doubles_it_when_calm(
    step_of: Steps, batches_of: Batches
) -> None:
    step, batch = step_of(dtype=torch.float16), batches_of()
    counters = step.counters
    assert counters["loss_scale"] == LOSS_SCALE_START
    assert step(batch, 1e-3).applied
    assert (counters["loss_scale"], counters["calm"]) == (LOSS_SCALE_START, 1)
    counters["loss_scale"].fill_(2.0**40)  # beyond what fp16 holds
    before = snapshot(step)
    assert not step(batch, 1e-3).applied
    assert (counters["loss_scale"], counters["calm"]) == (2.0**39, 0)
    for now, then in zip(snapshot(step), before, strict=True):
        assert torch.equal(now, then)
    counters["loss_scale"].fill_(64.0)
    counters["calm"].fill_(LOSS_SCALE_PATIENCE - 2)
    assert step(batch, 1e-3).applied
    assert (counters["loss_scale"], counters["calm"]) == (64.0, LOSS_SCALE_PATIENCE - 1)
    assert step(batch, 1e-3).applied
    assert (counters["loss_scale"], counters["calm"]) == (128.0, 0)


def test_the_loss_scale_changes_no_gradient(step_of: Steps, batches_of: Batches) -> None:
    step, exact, batch = step_of(dtype=torch.float16), step_of(dtype=torch.float32), batches_of()
    _, scaled = step.gradient(batch)
    _, plain = exact.gradient(batch)
    assert (scaled - plain).norm() / plain.norm() < 0.01
    assert step(batch, 1e-3).grad_norm == pytest.approx(plain.norm().item(), rel=0.01)


def test_clipping_comes_before_the_step(step_of: Steps, batches_of: Batches) -> None:
    sgd = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    batch = batches_of()
    for clip, expected in ((0.01, 0.01), (0.0, None), (1e6, None)):
        step = step_of(train=sgd | {"clip": clip})
        before = step.arena.weights.clone()
        result = step(batch, 0.5)
        moved = (step.arena.weights - before).norm().item() / 0.5
        assert result.grad_norm > 0.05, "the norm that is reported is that before clipping"
        assert moved == pytest.approx(expected or result.grad_norm, rel=1e-4)


def test_low_precision_is_a_copy_of_float32_masters(step_of: Steps, batches_of: Batches) -> None:
    step = step_of(dtype=torch.bfloat16)
    for seed in range(3):
        step(batches_of(seed=seed), 1e-5)  # too small a rate for bf16 to hold what it changes
    arena = step.arena
    assert arena.weights.dtype == torch.float32
    assert torch.equal(arena.compute, arena.weights.bfloat16())
    assert not torch.equal(arena.weights, arena.compute.float())
    assert not torch.equal(arena.weights, step_of(dtype=torch.bfloat16).arena.weights)


def test_batch_norm_moves_its_running_averages_once_a_micro_batch(
    step_of: Steps, batches_of: Batches
) -> None:
    step = step_of(norm="batchnorm")
    norm = step.model.layers[0].attention_norm
    batches = batches_of(2)
    expected = norm.running_mean.clone()
    for ids, _ in batches:
        seen = step.model.embedding.embed(ids).mean((0, 1)).detach()
        expected += (seen - expected) * norm.momentum
    step(batches, 0.01)
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [(torch.float32, "adamw"), (torch.bfloat16, "adamw"), (torch.float32, "sgd")],
)
def test_it_learns_one_batch_by_heart(
    dtype: torch.dtype, optimizer: str, step_of: Steps, batches_of: Batches
) -> None:
    train = {"optimizer": optimizer, "weight_decay": 0.0}
    nano = {"d_model": 64, "n_heads": 2, "d_ff": 192, "context": 32}
    step = step_of(train=train, dtype=dtype, **nano)
    batch = batches_of(size=2, length=32)
    rate = 0.01 if optimizer == "adamw" else 0.2
    losses = [step(batch, rate).loss for _ in range(150)]
    assert losses[0] > 3.0
    assert losses[-1] < 0.05


def test_evaluation_in_chunks_is_the_summed_loss(step_of: Steps, batches_of: Batches) -> None:
    ids, targets = batches_of(masked=0.3)[0]
    for chunk in (0, 1, 7):
        step = step_of(chunk=chunk)
        step.model.eval()
        expected = mean_loss(step, [(ids, targets)]) * (targets != IGNORE).sum()
        torch.testing.assert_close(
            step.evaluate(ids, targets), expected.detach(), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize(
    "fields", [{}, pytest.param({"norm": "batchnorm"}, marks=pytest.mark.slow)]
)
def test_a_compiled_step_is_close_to_an_eager_one(
    fields: dict,
    step_of: Steps,
    batches_of: Batches,
    cache: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cllm.core.machine import cannot_compile

    if cannot_compile():
        pytest.skip(str(cannot_compile()))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{cache}/inductor")
    eager = step_of(dtype=torch.float32, n_layers=1, **fields)
    compiled = step_of(dtype=torch.float32, n_layers=1, **fields, compiled=True)
    for seed in range(4):
        one, other = eager(batches_of(seed=seed), 1e-3), compiled(batches_of(seed=seed), 1e-3)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    start = step_of(dtype=torch.float32, n_layers=1, **fields).arena.weights
    moved = (eager.arena.weights - start).norm()
    assert (eager.arena.weights - compiled.arena.weights).norm() < 0.01 * moved
