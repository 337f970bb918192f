"""Updates within the backward pass give the bits of updates at the end, and say what they cannot undo."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cllm.core.config import Config
from cllm.core.errors import UsageError, UserError
from cllm.training.choose import choose
from cllm.training.feed import MicroBatches
from cllm.training.step import TrainStep

Steps = Callable[..., TrainStep]
Batches = Callable[..., MicroBatches]

COMPOSED = {"pieces": 31, "nonzeros": 69}
SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": False},
    {"norm": "batchnorm", "mlp": "gelu", "positions": "learned"},
    {"embedding": {"kind": "composed+reduced", "rank": 5, **COMPOSED}},
    {"embedding": {"lattice": "reduced", "kind": "reduced", "rank": 8}},
]
PRECISIONS = [
    {"dtype": torch.float64},
    {"dtype": torch.float32},
    {"dtype": torch.bfloat16},
]
EARLY = {"clip": 0.0, "optimizer_in_backward": True}


def state(step: TrainStep) -> list[Tensor]:
    """All that a step changes."""
    arena = step.arena
    live = [arena.weights, arena.compute, arena.grad, *arena.moments.values()]
    return [tensor.clone() for tensor in (*live, *step.model.buffers())]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fields", SHAPES)
def test_bits_are_those_of_an_update_at_the_end(
    fields: dict[str, Any],
    precision: dict[str, Any],
    optimizer: str,
    step_of: Steps,
    batches_of: Batches,
) -> None:
    rule = {"optimizer": optimizer}
    late = step_of(train={"clip": 0.0} | rule, **precision, **fields)
    early = step_of(train=EARLY | rule, **precision, **fields)
    before = early.arena.weights.clone()
    for number in range(5):
        batches = batches_of(seed=number, masked=0.2)
        one, other = late(batches, 1e-2), early(batches, 1e-2)
        assert one.loss == other.loss
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
        assert other.applied
        for mine, theirs in zip(state(early), state(late), strict=True):
            assert torch.equal(mine, theirs)
    assert not torch.equal(early.arena.weights, before)


def test_a_layer_is_updated_before_the_layers_below_have_gradients(
    step_of: Steps, batches_of: Batches
) -> None:
    step = step_of(train=EARLY)
    assert step.early is not None
    heard, update = [], step.optimizer.update
    lowest = step.arena.dense_layout.views(step.arena.grad)["layers.0.attention.qkv.weight"]

    def told(part: Any, *rest: Any) -> None:
        heard.append((part.first, bool(lowest.any())))
        update(part, *rest)

    step.early.optimizer = type("Told", (), {"update": staticmethod(told)})()  # type: ignore[assignment]
    step(batches_of(), 1e-3)
    places = {part.first: name for name, part in step.early._parts.items()}
    order = [places[first] for first, _ in heard]
    assert sorted(order) == sorted(places.values())
    assert len(order) == len(set(order))
    assert order[-1].startswith("embedding")
    above = [known for name, (_, known) in zip(order, heard, strict=True) if "layers.1." in name]
    assert above
    assert not any(above)


def test_a_loss_that_is_not_finite_changes_nothing(step_of: Steps, batches_of: Batches) -> None:
    step = step_of(train=EARLY, norm="batchnorm")
    step(batches_of(), 1e-3)
    step.arena.weights[: step.arena.decaying].mul_(1e200)
    step.arena.refresh()
    before = [*step.arena.moments.values(), *step.model.buffers(), step.arena.weights]
    before = [tensor.clone() for tensor in before]
    found = step(batches_of(), 1e-3)
    after = [*step.arena.moments.values(), *step.model.buffers(), step.arena.weights]
    assert not found.applied
    assert int(step.counters["skipped"]) == 1
    assert step.is_whole
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_gradient_that_is_not_finite_ends_the_training(
    step_of: Steps, batches_of: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(train=EARLY)
    assert step.early is not None
    known, spoiled = step.early.known, "layers.0.attention.qkv.weight"

    def spoil(name: str, grad: Tensor) -> None:
        known(name, grad * float("inf") if name == spoiled else grad)

    monkeypatch.setattr(step.early, "known", spoil)
    with pytest.raises(UserError, match=re.escape(spoiled)):
        step(batches_of(), 1e-3)
    assert not step.is_whole  # no checkpoint is made of it


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("train.clip = 1", {"train.clip": 1.0}),
        ("train.accumulate = 2", {"train.accumulate": 2}),
        ("train.dtype = 'fp16'", {"train.dtype": "fp16"}),
        ("train.compile = 'on'", {"train.compile": "on"}),
        ("train.optimizer_in_backward", {"train.parallel.workers": 2}),
        ("train.parallel.workers = 'auto'", {"train.parallel.workers": "auto"}),
        ("train.pipeline.mode = 'stages'", {"train.pipeline.mode": "stages"}),
        ("train.pipeline.mode = 'delayed'", {"train.pipeline.mode": "delayed"}),
        ("train.lazy_rows = 'on'", {"train.lazy_rows": "on"}),
        ("train.loss = 'sampled'", {"train.loss": "sampled"}),
        ("train.similarity.weight", {"train.similarity.weight": 0.1}),
    ],
)
def test_what_needs_the_whole_gradient_is_refused(setting: str, changes: dict[str, Any]) -> None:
    asked = {"train.clip": 0.0, "train.optimizer_in_backward": True} | changes
    with pytest.raises((UsageError, ValueError), match=re.escape(setting)):
        Config().replace(**asked)


def test_it_runs_uncompiled_and_says_so() -> None:
    asked = {"train.clip": 0.0, "train.optimizer_in_backward": True, "model.vocab_size": 4096}
    choices = choose(Config().replace(**asked, **{"train.steps": 100_000, "train.device": "cpu"}))
    assert choices.config.train.compile == "off"
    assert any("all gradients at once" in line for line in choices.lines())
