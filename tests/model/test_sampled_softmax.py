"""Sampled softmax: its gradients, what it estimates, and where it is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cllm.model.cross_entropy import IGNORE, linear_cross_entropy
from cllm.model.sampled_softmax import sampled_cross_entropy
from cllm.training.candidates import stratified, unigram

N, V, D = 13, 29, 8


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden vectors, a table, and targets of which some are not scored."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(N, D, generator=generator, dtype=torch.float64)
    table = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = IGNORE
    return h, table, targets


SCALE = torch.tensor(0.3, dtype=torch.float64)


def test_with_every_token_a_candidate_it_is_the_exact_cross_entropy(case) -> None:
    h, table, targets = case
    found = sampled_cross_entropy(h, table, targets, torch.arange(V), torch.zeros(V), SCALE)
    exact = linear_cross_entropy(h, table, targets, SCALE)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("repeated", [False, True])
def test_its_gradients_are_those_of_autograd(case, repeated: bool) -> None:
    h, table, targets = (t.clone() for t in case)
    candidates = torch.tensor([3, 3, 7, 20, int(targets[1])] if repeated else [5, 1, 28])
    logs = torch.linspace(-2.0, 0.0, len(candidates), dtype=torch.float64)
    loss, h_grad, table_grad = sampled_cross_entropy(h, table, targets, candidates, logs, SCALE)
    h.requires_grad_(), table.requires_grad_()
    losses = []
    for row, y in zip(h, targets.tolist(), strict=True):
        if y == IGNORE:
            continue
        keep = [i for i, c in enumerate(candidates.tolist()) if c != y]
        scores = torch.stack(
            [row @ table[y], *(row @ table[candidates[i]] - logs[i] for i in keep)]
        )
        losses.append(torch.logsumexp(scores, 0) - scores[0])
    expected = torch.stack(losses).sum()
    grads = torch.autograd.grad(SCALE * expected, [h, table])
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(h_grad, grads[0], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(table_grad, grads[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", [4, 16])
def test_the_denominator_is_right_on_average_and_the_loss_too_low(case, size: int) -> None:
    h, table, targets = (case[0][:1] * 0.7, case[1], torch.tensor([11]))
    logits = h @ table.T
    chances = unigram(torch.arange(V).numpy() * 3)
    sums, losses = [], []
    for key in range(4000):
        ids, expected = stratified(chances, size, key)
        logs = torch.from_numpy(expected).log()
        loss, _, _ = sampled_cross_entropy(h, table, targets, torch.from_numpy(ids), logs, SCALE)
        losses.append(float(loss))
        sums.append(float((loss + logits[0, 11]).exp()))
    found, exact = torch.tensor(sums), float(logits.exp().sum())
    error = float(found.std()) / len(sums) ** 0.5
    assert abs(float(found.mean()) - exact) < 4 * error
    assert 0.2 * error < 0.02 * exact, "or the test could not fail"
    truth = float(functional.cross_entropy(logits, targets))
    assert sum(losses) / len(losses) < truth


def test_a_batch_without_targets_has_no_loss(case) -> None:
    h, table, targets = case
    nothing = torch.full_like(targets, IGNORE)
    found = sampled_cross_entropy(h, table, nothing, torch.arange(4), torch.zeros(4), SCALE)
    assert all(bool((tensor == 0).all()) for tensor in found)
