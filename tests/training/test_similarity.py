"""The loss that pulls tokens of similar codes together: its gradient, its fading, its pairs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from cllm.core.config import TrainConfig
from cllm.model.cross_entropy import IGNORE
from cllm.text.merge_tree import MergeTree
from cllm.text.token_codes import TokenCodes
from cllm.training.draws import Draws
from cllm.training.feed import MicroBatches
from cllm.training.neighbours import Neighbours
from cllm.training.schedule import similarity_weight
from cllm.training.step import TrainStep

Steps = Callable[..., TrainStep]
Batches = Callable[..., MicroBatches]

COMPOSED = {"pieces": 31, "nonzeros": 69}
KINDS = [
    {},
    {"tie_embeddings": False},
    {"embedding": {"kind": "reduced", "rank": 8}},
    {"embedding": {"kind": "composed", **COMPOSED}},
    {"embedding": {"kind": "composed+reduced", "rank": 5, **COMPOSED}, "tie_embeddings": False},
    {"embedding": {"lattice": "z"}},
    {"embedding": {"kind": "reduced", "rank": 8, "lattice": "reduced"}},
]


def expected_losses(step: TrainStep, batches: MicroBatches) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and similarity loss, by the module and torch's own means."""
    logits = torch.cat([step.model(ids).flatten(0, 1) for ids, _ in batches])
    targets = torch.cat([y.flatten() for _, y in batches])
    exact = functional.cross_entropy(logits, targets, ignore_index=IGNORE)
    assert step.draws.pairs is not None
    table, losses = step.model.embedding.table(), []
    for number in range(len(batches)):
        (first, second), alike = step.draws.pairs.draw(number)
        a, b = table[torch.from_numpy(first)], table[torch.from_numpy(second)]
        cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        losses.append((torch.from_numpy(alike) * (1 - cosine)).mean())
    return exact, torch.stack(losses).mean()


@pytest.mark.parametrize("fields", KINDS)
def test_its_gradient_is_that_of_autograd_for_every_kind(
    fields: dict, step_of: Steps, batches_of: Batches, draws_of: Callable[..., Draws]
) -> None:
    step = step_of(draws=draws_of(pairs=9), **fields)
    batches = batches_of(2, masked=0.3)
    exact, alike = expected_losses(step, batches)
    names = dict(step.model.named_parameters())
    wanted = torch.autograd.grad(exact + 0.7 * alike, list(names.values()))
    loss, flat = step.gradient(batches, 0.7)
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-12, atol=0)
    views = step.arena.layout.views(flat)
    for name, grad in zip(names, wanted, strict=True):
        torch.testing.assert_close(views[name], grad, rtol=1e-8, atol=1e-13, msg=name)
    _, without = step.gradient(batches, 0.0)
    assert not torch.allclose(flat, without, rtol=1e-3, atol=1e-8)


def test_the_step_reports_it_apart_from_the_loss(
    step_of: Steps, batches_of: Batches, draws_of: Callable[..., Draws]
) -> None:
    pulled, plain = step_of(draws=draws_of(pairs=9)), step_of()
    batches = batches_of(2)
    exact, alike = expected_losses(pulled, batches)
    result = pulled(batches, 0.01, 5.0)
    assert result.loss == pytest.approx(exact.item(), rel=1e-10)
    assert result.similarity == pytest.approx(alike.item(), rel=1e-10)
    other = plain(batches, 0.01)
    assert other.similarity is None
    assert other.loss == pytest.approx(result.loss, rel=1e-12)
    assert not torch.allclose(pulled.arena.weights, plain.arena.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_with_no_weight_it_changes_nothing(
    dtype: torch.dtype, step_of: Steps, batches_of: Batches, draws_of: Callable[..., Draws]
) -> None:
    faded, plain = step_of(draws=draws_of(pairs=9), dtype=dtype), step_of(dtype=dtype)
    for seed in range(3):
        batch = batches_of(seed=seed)
        faded(batch, 0.01, 0.0)
        plain(batch, 0.01)
    assert torch.equal(faded.arena.weights, plain.arena.weights)


def test_pairs_grow_alike_under_it(step_of: Steps, batches_of: Batches, draws_of) -> None:
    step = step_of(draws=draws_of(pairs=32))
    first = step(batches_of(), 0.01, 3.0).similarity
    for _ in range(30):
        last = step(batches_of(), 0.01, 3.0).similarity
    assert first is not None
    assert last is not None
    assert last < 0.7 * first


def test_its_weight_falls_in_a_line_to_nothing() -> None:
    config = TrainConfig(steps=100, similarity={"weight": 2.0, "until": 0.25})
    weights = [similarity_weight(config, step) for step in range(100)]
    np.testing.assert_allclose(weights[:25], 2.0 * (1 - np.arange(25) / 25), atol=1e-12)
    assert set(weights[25:]) == {0.0}
    assert not any(similarity_weight(TrainConfig(), step) for step in (0, 5))


def test_pairs_are_of_neighbours_and_repeat(draws_of: Callable[..., Draws]) -> None:
    source, other = draws_of(pairs=40).pairs, draws_of(pairs=40, seed=8).pairs
    assert source is not None
    assert other is not None
    (first, second), alike = source.draw(3)
    near = source.neighbours
    for i, j, s in zip(first, second, alike, strict=True):
        place = near.ids[i].tolist().index(j)
        assert s == near.similarities[i, place] > 0
    assert 22 not in first, "it has no neighbours"
    assert len(set(first.tolist())) > 10
    assert np.array_equal(source.draw(3)[0], np.stack([first, second]))
    assert not np.array_equal(source.draw(4)[0], source.draw(3)[0])
    assert not np.array_equal(other.draw(3)[0], source.draw(3)[0])


def test_neighbours_are_those_that_the_codes_name() -> None:
    merges = [["a", "b"], ["ab", "c"], ["ab", "d"], ["a", "d"], ["ab", "ab"]]
    names = ["a", "b", "c", "d", *("".join(pair) for pair in merges)]
    model = {"type": "BPE", "vocab": {n: i for i, n in enumerate(names)}, "merges": merges}
    codes = TokenCodes.build(MergeTree.from_tokenizer({"model": model}))
    found = Neighbours.of(codes, 3, len(codes) + 2)
    ids, scores = codes.similar(list(range(len(codes))), 3)
    np.testing.assert_allclose(found.similarities[: len(codes)], scores)
    clear = np.ones_like(ids, dtype=bool)  # among equals at the end, either may be taken
    clear[:, -1] = False
    clear[:, :-1] &= scores[:, :-1] > scores[:, -1:]
    assert clear.sum() >= 5
    assert np.array_equal(found.ids[: len(codes)][clear], ids[clear])
    assert (found.similarities[len(codes) :] == 0).all()
    counts = np.zeros(len(codes) + 2)
    counts[4] = 2
    spread = found.spread(counts)
    assert spread.sum() == pytest.approx(2 * scores[4].sum())
    assert np.array_equal(np.flatnonzero(spread), np.sort(ids[4][scores[4] > 0]))
