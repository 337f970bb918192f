"""Tables updated by rows: the dense training, but for the bits of what is not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cllm.training.draws import Draws
from cllm.training.feed import MicroBatches
from cllm.training.lazy_rows import restore_idle
from cllm.training.step import TrainStep

Steps = Callable[..., TrainStep]
Batches = Callable[..., MicroBatches]

COMPOSED = {"pieces": 31, "nonzeros": 69}
UNTIED = {"tie_embeddings": False}
KINDS = [
    {},
    {"embedding": {"kind": "reduced", "rank": 8}},
    {"embedding": {"kind": "composed", **COMPOSED}},
    {"embedding": {"kind": "composed+reduced", "rank": 5, **COMPOSED}},
    {"embedding": {"lattice": "z", "lattice_step": 1e-4}},
]
SAMPLED = {"loss": "sampled"}
FEW = {"length": 3}
"""Batches of six tokens or fewer of 23, so that rows idle."""


def both(step_of: Steps, train: dict[str, Any], **fields: Any) -> tuple[TrainStep, TrainStep]:
    """A step by rows and a dense one."""
    fine, fields = {"eps": 1e-14} | train, {"n_layers": 1} | fields
    return (
        step_of(train=fine | {"lazy_rows": "on"}, **fields),
        step_of(train=fine | {"lazy_rows": "off"}, **fields),
    )


def weights(step: TrainStep) -> dict[str, torch.Tensor]:
    with step.settled():
        return {name: tensor.clone() for name, tensor in step.model.state_dict().items()}


@pytest.mark.parametrize(
    ("optimizer", "way", "fields"),
    [
        *(("adamw", "untied sampled", fields) for fields in KINDS),
        ("adamw", "untied exact", KINDS[0]),
        ("adamw", "untied exact", KINDS[2]),
        ("adamw", "tied sampled", KINDS[1]),
        ("adamw", "tied sampled", KINDS[3]),
        ("sgd", "untied sampled", KINDS[2]),
        ("sgd", "tied sampled", KINDS[0]),
    ],
)
def test_it_is_the_dense_training(
    optimizer: str,
    way: str,
    fields: dict,
    step_of: Steps,
    batches_of: Batches,
    draws_of: Callable[..., Draws],
) -> None:
    train: dict[str, Any] = {"optimizer": optimizer}
    if "sampled" in way:
        train |= SAMPLED
        fields = fields | {"draws": draws_of(candidates=4)}
    if "untied" in way:
        fields = fields | UNTIED
    lazy, dense = both(step_of, train, **fields)
    idle = 0
    for seed in range(10):
        batch = batches_of(1, seed=seed, masked=0.3, **FEW)
        one, other = lazy(batch, 0.01 / (1 + seed)), dense(batch, 0.01 / (1 + seed))
        assert one.loss == pytest.approx(other.loss, rel=1e-9)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-8)
        assert lazy.lazy is not None
        idle += sum(int((at < seed).sum()) for at in lazy.lazy.touched.values())
    assert idle > 30, "or nothing was shown"
    for name, tensor in weights(dense).items():
        torch.testing.assert_close(weights(lazy)[name], tensor, rtol=1e-7, atol=1e-10, msg=name)
    lazy.settle()
    for moment, views in dense.arena.named_moments().items():
        for name, view in views.items():
            found = lazy.arena.named_moments()[moment][name]
            torch.testing.assert_close(found, view, rtol=1e-7, atol=1e-12, msg=f"{moment} {name}")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("fields", KINDS[:3])
def test_with_every_row_in_use_it_is_the_dense_update(
    fields: dict, optimizer: str, step_of: Steps
) -> None:
    lazy, dense = both(step_of, {"optimizer": optimizer, "eps": 1e-8}, **UNTIED, **fields)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        ids = torch.cat([torch.randperm(23, generator=generator), torch.arange(1)]).view(3, 8)
        targets = torch.randint(23, (3, 8), generator=generator)
        for step in (lazy, dense):
            step([(ids, targets)], 0.01)
    for name, view in lazy.arena.layout.views(lazy.arena.weights).items():
        expected = dense.arena.layout.views(dense.arena.weights)[name]
        torch.testing.assert_close(view, expected, rtol=1e-12, atol=1e-15, msg=name)


def test_rows_that_are_not_used_keep_their_bits(step_of: Steps) -> None:
    step = step_of(train={"lazy_rows": "on"}, **UNTIED)
    views = {"weights": step.arena.layout.views(step.arena.weights)["embedding.weight"]}
    views |= {m: v["embedding.weight"] for m, v in step.arena.named_moments().items()}
    first = torch.arange(16).view(2, 8)
    step([(first, first)], 0.01)
    before = {name: view.clone() for name, view in views.items()}
    used = torch.tensor([1, 5, 9])
    ids = used.repeat(6)[:16].view(2, 8)
    for _ in range(3):
        step([(ids, ids)], 0.01)
    others = torch.ones(23, dtype=torch.bool)
    others[used] = False
    for name, view in views.items():
        assert torch.equal(view[others], before[name][others]), name
        assert not torch.equal(view[used], before[name][used]), name


@pytest.mark.parametrize("fields", [{}, *KINDS[2:4]])
def test_the_gradient_is_that_of_autograd(
    fields: dict, step_of: Steps, batches_of: Batches
) -> None:
    lazy, dense = both(step_of, {}, **UNTIED, **fields)
    batches = batches_of(2, masked=0.4, **FEW)
    for step in (lazy, dense):
        step(batches, 0.01)
    more = batches_of(2, seed=7, masked=0.4, **FEW)
    found = lazy.arena.layout.views(lazy.gradient(more)[1])
    for name, grad in dense.arena.layout.views(dense.gradient(more)[1]).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-7, atol=1e-12, msg=name)


def test_a_skipped_step_leaves_no_trace(step_of: Steps, batches_of: Batches) -> None:
    steps = [step_of(train={"lazy_rows": "on"}, dtype=torch.float32, **UNTIED) for _ in range(2)]
    for step in steps:
        step(batches_of(seed=1, **FEW), 0.01)
        step(batches_of(seed=2, **FEW), 0.01)
    damaged = steps[0].arena.weights
    kept = damaged[0].item()
    before = [damaged.clone(), *(m.clone() for m in steps[0].arena.moments.values())]
    damaged[0] = float("nan")
    assert not steps[0](batches_of(seed=3, **FEW), 0.01).applied
    damaged[0] = kept
    for now, then in zip([damaged, *steps[0].arena.moments.values()], before, strict=True):
        assert torch.equal(now, then)
    for step in steps:
        step(batches_of(seed=4, **FEW), 0.01)
    assert torch.equal(damaged, steps[1].arena.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_the_model_changes_no_bit_of_training(
    dtype: torch.dtype, step_of: Steps, batches_of: Batches
) -> None:
    def make() -> TrainStep:
        return step_of(train={"lazy_rows": "on"}, dtype=dtype, **UNTIED, **KINDS[2])

    watched, alone = make(), make()
    for seed in range(4):
        batch = batches_of(seed=seed, **FEW)
        watched(batch, 0.01)
        alone(batch, 0.01)
        watched.model.eval()
        with watched.settled(), watched.settled():
            watched.evaluate_eagerly(*batch[0])
        watched.model.train()
    assert torch.equal(watched.arena.weights, alone.arena.weights)


def test_scores_are_those_of_the_settled_model(step_of: Steps, batches_of: Batches) -> None:
    lazy, dense = both(step_of, {}, **UNTIED, **KINDS[2])
    for seed in range(6):
        for step in (lazy, dense):
            step(batches_of(seed=seed, **FEW), 0.01)
    (ids, targets), *_ = batches_of(seed=9)
    with lazy.settled():
        found = lazy.evaluate_eagerly(ids, targets)
    torch.testing.assert_close(found, dense.evaluate_eagerly(ids, targets), rtol=1e-8, atol=0)


def test_it_goes_on_from_its_state_to_the_bit(step_of: Steps, batches_of: Batches) -> None:
    train = {"lazy_rows": "on", "eps": 1e-14}
    straight = step_of(train=train, **UNTIED)
    for seed in range(4):
        straight(batches_of(seed=seed, **FEW), 0.01)
    assert straight.lazy is not None
    state, saved = straight.lazy.state(), weights(straight)
    moments = {
        m: {n: v.clone() for n, v in views.items()}
        for m, views in straight.arena.named_moments().items()
    }
    resumed, dense = step_of(train=train, **UNTIED), step_of(train={"eps": 1e-14}, **UNTIED)
    for step in (resumed, dense):
        step.arena.load(saved, moments)
        step.counters["applied"].fill_(4)
        step.refresh()
        restore_idle(step.arena, step.optimizer, step.lazy, state)
    for seed in range(4, 8):
        for step in (straight, resumed, dense):
            step(batches_of(seed=seed, **FEW), 0.01)
    assert torch.equal(resumed.arena.weights, straight.arena.weights)
    for name, tensor in weights(dense).items():  # goes on as a dense training, too
        torch.testing.assert_close(weights(straight)[name], tensor, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.slow
def test_compiled_it_does_the_same(
    step_of: Steps,
    batches_of: Batches,
    draws_of: Callable[..., Draws],
    cache: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cllm.core.machine import cannot_compile

    if cannot_compile():
        pytest.skip(str(cannot_compile()))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{cache}/inductor")
    made = [
        step_of(
            train={"lazy_rows": "on", "loss": "sampled"},
            dtype=torch.float32,
            n_layers=1,
            compiled=compiled,
            draws=draws_of(candidates=4, pairs=3, divisor=True),
        )
        for compiled in (False, True)
    ]
    for seed in range(4):  # with another number of rows in use each time
        batch = batches_of(seed=seed, length=3, masked=0.2)
        one, other = (step(batch, 1e-3, 0.1) for step in made)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert other.similarity == pytest.approx(one.similarity, rel=1e-4)
    torch.testing.assert_close(made[0].arena.weights, made[1].arena.weights, rtol=1e-3, atol=1e-5)
