"""Errors that cost what they do to the model: the metric of outputs, and rows decided in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cllm
from cllm.compress import rows
from cllm.compress.calibration import HELD_OUT, calibrate, calibration_windows
from cllm.compress.coded_fit import CodedSpec, fit_coded
from cllm.compress.decoders import Decoder, Points, babai
from cllm.compress.divergence import Judge
from cllm.compress.grids import GridSpec
from cllm.compress.output_metric import OutputMetric, drawn_to, output_metrics
from cllm.compress.problem import problem
from cllm.compress.rows import row_factor
from cllm.compress.scales import fit_grid
from cllm.compress.settings import Settings
from cllm.core.errors import UsageError
from cllm.text.dataset import load_prepared
from cllm.training.progress import Silent


def metric(n: int, seed: int, samples: int = 3) -> torch.Tensor:
    """A metric (n, n) of strongly correlated inputs."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(samples * n, n)) @ rng.normal(size=(n, n))
    return torch.from_numpy(X.T @ X / len(X))


def cost(G: torch.Tensor, errors: torch.Tensor, H: torch.Tensor) -> float:
    """tr(G E H Eᵀ)."""
    errors = errors.double()
    return float(((G.double() @ errors) * (errors @ H)).sum())


def test_rows_one_after_the_other_are_nearest_plane_on_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With blocks of one row, deciding row after row is Babai on vec(W) under G ⊗ H."""
    monkeypatch.setattr(rows, "SIZE", 1)
    m, n, step = 5, 6, 0.4
    G, H = metric(m, 0), metric(n, 1)
    W = torch.from_numpy(np.random.default_rng(2).normal(size=(m, n)))
    p = problem(W, H, damping=0.01, outer=G)
    assert p.rows is not None
    damped = p.rows.R.T @ p.rows.R  # in the order of p.rows.order
    found = torch.empty(m, n, dtype=torch.float64)

    def decide(some: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        one = p.with_weight(wanted)
        codes = babai(one, Points(torch.full(one.shape, step), torch.zeros(one.shape), -9, 9))
        found[some] = p.back(codes).double()
        return step * found[some]

    p.rows.each(p.original(), decide)
    # The whole matrix as one row: the row that is decided first, and its column, come first.
    down, across = p.rows.order.flip(0), p.order.flip(0)
    flat = W[down][:, across].reshape(1, -1)
    joint = torch.kron(damped.flip(0, 1), p.H[across][:, across])
    whole = problem(flat, joint, damping=0.0, order="natural")
    plane = babai(whole, Points(torch.full(whole.shape, step), torch.zeros(whole.shape), -9, 9))
    expected = whole.back(plane).view(m, n)
    assert torch.equal(found[down][:, across], expected.double())


@pytest.mark.parametrize("method", ["babai", "k-best"])
def test_rows_that_know_of_each_other_cost_less(method: str) -> None:
    m, n = 150, 24
    G, H = metric(m, 3), metric(n, 4)
    W = torch.from_numpy(np.random.default_rng(5).normal(size=(m, n))).float()
    spec, decoder = GridSpec(bits=3, symmetric=False, group=0), Decoder(method=method, K=4)
    costs = []
    for outer in (None, G):
        p = problem(W, H, dtype=torch.float32, outer=outer)
        grid, codes = fit_grid(p, spec, decoder, scales="search")
        assert codes.min() >= spec.low
        assert codes.max() <= spec.high
        costs.append(cost(G, W - grid.values(codes), H))
    assert costs[1] < 0.8 * costs[0]


def test_coded_rows_that_know_of_each_other_cost_less_at_the_same_bytes() -> None:
    pytest.importorskip("constriction")
    m, n = 130, 48
    G, H = metric(m, 3), metric(n, 4)
    W = torch.from_numpy(np.random.default_rng(5).normal(size=(m, n))).float()
    costs, target = [], 2 * m * n // 8
    for outer in (None, G):
        p = problem(W, H, dtype=torch.float32, outer=outer)
        made, data = fit_coded(p, target, Decoder(K=4), CodedSpec())
        assert 0.95 * target < len(data) <= target
        costs.append(cost(G, W - torch.from_numpy(made.dense()), H))
    assert costs[1] < 0.8 * costs[0]


def test_outputs_without_an_effect_and_single_rows_are_rounded_by_themselves() -> None:
    W, H = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), metric(8, 0)
    spec, decoder = GridSpec(bits=3, symmetric=True, group=0), Decoder(method="babai")
    for rows_of, outer in ((W, torch.zeros(3, 3)), (W[:1], torch.ones(1, 1))):
        alone = fit_grid(problem(rows_of, H), spec, decoder, scales="search")[1]
        both = fit_grid(problem(rows_of, H, outer=outer), spec, decoder, scales="search")[1]
        assert torch.equal(alone, both)


def test_errors_are_carried_to_where_the_objective_is_that_of_each_row() -> None:
    G, H = metric(7, 1), metric(4, 2)
    factor = row_factor(G)
    alone = torch.from_numpy(np.random.default_rng(0).normal(size=(7, 4)))
    carried = factor.carried(alone)
    back = torch.empty_like(G)
    back[factor.order[:, None], factor.order] = factor.R.T @ factor.R
    sizes = torch.diagonal(factor.R).square()
    by_row = (sizes[:, None] * (alone @ H)[factor.order] * alone[factor.order]).sum()
    assert cost(back, carried, H) == pytest.approx(float(by_row))


def test_what_few_vectors_tell_is_drawn_to_the_target_and_what_many_tell_is_not() -> None:
    rng = np.random.default_rng(0)
    truth = metric(20, 1) / 20
    root = torch.linalg.cholesky(truth)
    for count, most in ((12, 0.8), (200_000, 1.01)):
        X = torch.from_numpy(rng.normal(size=(count, 20))) @ root.T
        mean, fourth = X.T @ X / count, float(X.square().sum(dim=1).square().mean())
        level = torch.eye(20, dtype=torch.float64) * (torch.trace(mean) / 20)
        made = drawn_to(mean, level, fourth, count)
        assert (made - truth).norm() < most * (mean - truth).norm()
        assert float(torch.trace(made)) == pytest.approx(float(torch.trace(mean)))
        assert bool((torch.linalg.eigvalsh(made) > 0).all())
    assert torch.equal(drawn_to(level, level, 1.0, 3), level)


@pytest.fixture
def found(trained: Path) -> tuple[Any, np.ndarray, dict[str, OutputMetric]]:
    """A run's model, windows, and its metrics on them."""
    torch.set_num_threads(1)
    run = cllm.load(trained)
    tokens = load_prepared(run.directory.data).train
    windows = calibration_windows(tokens, run.config.model.context, count=2048)
    return run, windows, output_metrics(cllm.load(trained).model, windows, Silent())


def test_half_the_metric_of_an_error_is_the_divergence_that_it_causes(found: Any) -> None:
    run, windows, metrics = found
    model = run.model.eval()
    judge = Judge(model, model, torch.as_tensor(windows))
    generator = torch.Generator().manual_seed(0)
    told, measured = 0.0, 0.0
    for layer in calibrate(model, windows, outputs=metrics):
        weight = layer.linear.weight.detach()
        errors = 0.03 * weight.std() * torch.randn(weight.shape, generator=generator)
        # Tokens as heavy as they are salient: E[‖g‖² xxᵀ] = tr(G) · H.
        told += cost(metrics[layer.name].outer, errors, layer.whole) / 2
        measured += judge.divergence({f"{layer.name}.weight": weight + errors})
        trace = float(torch.trace(metrics[layer.name].outer))
        assert float(metrics[layer.name].saliency.mean()) == pytest.approx(trace, rel=1e-4)
    assert 0.6 < told / measured < 1.6


def test_statistics_are_as_heavy_as_tokens_are_salient(found: Any) -> None:
    run, windows, metrics = found
    name = "layers.0.attention.qkv"
    held = max(1, round(len(windows) * HELD_OUT))
    ones = torch.zeros_like(metrics[name].saliency)
    ones[:, 5] = 2.0  # the sixth token of each window alone
    some = metrics | {name: OutputMetric(metrics[name].outer, ones)}
    layer = next(calibrate(run.model, windows, outputs=some))
    seen: list[torch.Tensor] = []
    handle = layer.linear.register_forward_pre_hook(lambda _, x: seen.append(x[0].double()))
    with torch.no_grad():
        run.model.hidden(torch.as_tensor(windows))
    handle.remove()
    rows_of = seen[0][held:, 5]
    alone = rows_of.T @ rows_of / len(rows_of)
    plain = next(calibrate(run.model, windows))
    flat = seen[0][held:].flatten(0, 1)
    torch.testing.assert_close(plain.fit, flat.T @ flat / len(flat), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(layer.seen, plain.whole)
    # So few tokens are drawn to what all tokens tell, by one share for all entries.
    share = ((layer.fit - plain.fit) / (alone - plain.fit))[(alone - plain.fit).abs() > 1e-3]
    assert 0.05 < float(share.mean()) < 0.95
    assert float(share.std()) < 1e-3
    assert plain.outer is None


def test_who_is_weighed_by_the_model() -> None:
    assert Settings().by_model
    assert Settings(grid="coded", bits=2.2).by_model
    assert Settings(method="babai", metric="model").by_model
    for plain in (
        {"method": "babai"},
        {"metric": "inputs"},
        {"rotate": "hadamard"},
        {"grid": "coded", "lattice": "e8"},
        {"method": "fp16"},
    ):
        assert not Settings(**plain).by_model
    for wrong in ({"method": "rtn"}, {"rotate": "hadamard"}, {"prune": "50%", "method": "fp16"}):
        with pytest.raises(UsageError, match="--metric model decides integers"):
            Settings(metric="model", **wrong)
    with pytest.raises(UsageError, match="--metric is one of auto, inputs, model, not 'x'"):
        Settings(metric="x")
