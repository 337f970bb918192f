"""The certificate: the profile's error, draws of it, and a prediction that holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cllm.compress.calibration import Layer
from cllm.compress.certificate import forecast
from cllm.compress.command import compress_run
from cllm.compress.decoders import Decoder, points_of
from cllm.compress.divergence import Judge
from cllm.compress.expected import expected_coded, expected_in_box, expected_on_grid
from cllm.compress.grids import GridSpec, range_grid
from cllm.compress.outlook import outlook
from cllm.compress.problem import problem
from cllm.compress.scales import fit_grid
from cllm.compress.settings import Settings
from cllm.compress.source import Source, open_source
from cllm.core.errors import UsageError, UserError
from cllm.training.progress import Silent

QUICK = {"tokens": 1024, "bits": 2, "method": "babai", "table": "fp16", "scales": "search"}


def made(m: int = 200, n: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (m, n) and a metric (n, n) of correlated inputs."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(4 * n, n)) @ (np.eye(n) + rng.normal(size=(n, n)) * 0.3)
    return torch.from_numpy(rng.normal(size=(m, n)) * 0.1), torch.from_numpy(X.T @ X)


@pytest.mark.parametrize(("bits", "near"), [(2, 0.06), (3, 0.03), (4, 0.02), (8, 0.01)])
def test_the_profile_foretells_the_error_of_nearest_plane(bits: int, near: float) -> None:
    W, H = made()
    p, spec = problem(W, H), GridSpec(bits=bits, symmetric=bits > 3, group=0)
    grid = range_grid(W, spec, 0.7 if bits < 4 else 1.0)
    found = p.objective(grid.values(Decoder(method="babai")(p, grid)))
    wanted = expected_in_box(p, points_of(p, grid))
    assert float(found.sum()) == pytest.approx(float(wanted.error.sum()), rel=near)
    # A search takes of each row the best that came about, which is a little better than what was likeliest.
    searched, codes = fit_grid(p, spec, Decoder(method="babai"), scales="search")
    best = float(p.objective(searched.values(codes)).sum())
    assert 0.75 < best / float(expected_on_grid(p, spec).error.sum()) < 1.01


def test_overload_is_counted_where_the_box_is_narrow() -> None:
    W, H = made()
    p, spec = problem(W, H), GridSpec(bits=2, symmetric=False, group=0)
    grid = range_grid(W, spec, 0.25)
    found = float(p.objective(grid.values(Decoder(method="babai")(p, grid))).sum())
    wanted = expected_in_box(p, points_of(p, grid))
    inside = float((p.squares.sum() * grid.scale.square() / 12).sum())
    assert found > 3 * inside
    assert found == pytest.approx(float(wanted.error.sum()), rel=0.03)


@pytest.mark.parametrize("bits", [1.5, 2.5, 4.0])
def test_a_water_level_has_the_rate_that_was_asked_for(bits: float) -> None:
    W, H = made(600)
    p = problem(W, H)
    expected = expected_coded(p, bits)
    step = float((12 * expected.squares.max()) ** 0.5)
    points = torch.full(p.shape, step, dtype=torch.float64)
    from cllm.compress.decoders import Points, babai

    codes = babai(p, Points(points, torch.zeros_like(points), -1e6, 1e6)).numpy()
    shares = [np.unique(codes[:, j], return_counts=True)[1] / len(codes) for j in range(48)]
    rate = np.mean([-(s * np.log2(s)).sum() for s in shares])
    assert rate == pytest.approx(bits, abs=0.1)
    found = float(p.objective(p.back(torch.from_numpy(codes)) * step).sum())
    assert found == pytest.approx(float(expected.error.sum()), rel=0.12)


def test_a_draw_has_the_expected_error_and_is_like_nearest_planes() -> None:
    W, H = made()
    p, spec = problem(W, H), GridSpec(bits=3, symmetric=True, group=0)
    expected = expected_on_grid(p, spec)
    error = expected.draw(p, torch.Generator().manual_seed(0))
    size = float(p.objective(W - error).sum())
    assert size == pytest.approx(float(expected.error.sum()), rel=0.05)
    distances = error[:, p.order].double() @ p.U.double().T
    torch.testing.assert_close(
        distances.square().mean(0), expected.squares.double().mean(0), rtol=0.35, atol=0
    )


def test_a_draw_shortens_what_a_narrow_box_shortens() -> None:
    W, H = made()
    p, spec = problem(W, H), GridSpec(bits=2, symmetric=False, group=0)
    grid = range_grid(W, spec, 0.25)
    expected = expected_in_box(p, points_of(p, grid))
    drawn = expected.draw(p, torch.Generator().manual_seed(0)).double()
    error = W - grid.values(Decoder(method="babai")(p, grid))
    shortened = float((error.double() @ H * W).sum())
    assert shortened > 0.1 * float((W @ H * W).sum())
    assert float((drawn @ H * W).sum()) == pytest.approx(shortened, rel=0.05)


def test_divergence_is_nothing_for_the_same_weights_and_counts_targets_only(
    trained: Path, isolated: Path
) -> None:
    source = open_source(trained, Settings(**QUICK), Silent())
    ids = torch.as_tensor(source.windows[:3])
    judge = Judge(source.model(), source.model(), ids)
    name = "layers.0.mlp.out.weight"
    assert judge.divergence({}) == pytest.approx(0, abs=1e-6)
    changed = {name: torch.zeros_like(source.weights[name])}
    divergence, rise = judge.with_loss(changed, torch.full_like(ids, -100))
    assert not divergence.any()
    assert not rise.any()
    divergence, rise = judge.with_loss(changed, ids)
    torch.testing.assert_close(divergence, judge.each(changed))
    model = source.model()
    before = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    with torch.no_grad():
        model.load_state_dict(source.weights | changed)
    after = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    assert float(rise.mean()) == pytest.approx(float((after - before).detach()), rel=1e-3, abs=1e-6)


def check_errors(source: Source, settings: Settings, made: list[dict[str, Any]]) -> None:
    """Each layer errs as predicted, on the mean of four forecasts.

    What the layers before were drawn to make of its inputs leaves one forecast uncertain by a sixth, where
    few directions of them matter.
    """
    errors = {layer["name"]: layer["error"] for layer in made}
    several = [forecast(source, settings, Silent(), seed).layers for seed in range(4)]
    for drawn in zip(*several, strict=True):
        (name,) = {layer.name for layer in drawn}
        mean = sum(layer.error for layer in drawn) / len(drawn)
        assert mean == pytest.approx(errors[name], rel=0.35)


def test_what_is_predicted_comes_about_and_nothing_is_compressed_for_it(
    trained: Path, isolated: Path, cllm: Any
) -> None:
    source = open_source(trained, Settings(**QUICK), Silent())
    found = forecast(source, Settings(**QUICK), Silent())
    assert found == forecast(source, Settings(**QUICK), Silent())
    assert len(found.layers) == 8
    made = compress_run(trained, Settings(**QUICK), Silent(), out=isolated / "a.cllm", predict=True)
    assert made.forecast["rise"] == pytest.approx(found.rise)
    assert found.low <= made.rise <= found.high
    check_errors(source, Settings(**QUICK), made.layers)
    fine = forecast(source, Settings(**(QUICK | {"bits": 8})), Silent())
    assert abs(fine.rise) < 0.05 * found.rise
    before = set(trained.rglob("*"))
    result = cllm("compress", trained, "--bits", 2, "--method", "babai", "--table", "fp16",
                  "--tokens", 1024, "--predict", "-q")  # fmt: skip
    assert result.code == 0, result.err
    assert "predicted rise" in result.out
    assert set(trained.rglob("*")) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": "coded", "lattice": "e8"},
        {"grid": "coded", "lattice": "leech"},
        {"grid": "e8"},
        {"rotate": "hadamard"},
    ],
    ids=str,
)
def test_blocks_and_rotated_layers_err_as_predicted(
    changes: dict[str, str], trained: Path, isolated: Path
) -> None:
    settings = Settings(**(QUICK | {"bits": 3} | changes))
    made = compress_run(trained, settings, Silent(), out=isolated / "a.cllm")
    check_errors(open_source(trained, settings, Silent()), settings, made.layers)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "fp16", "--predict"],
        ["--prune", "50%", "--predict"],
        ["--recover", 5, "--predict"],
        ["--grid", "coded", "--size", "60KB", "--certificate"],
    ],
    ids=str,
)
def test_what_cannot_be_predicted_is_refused(
    arguments: list[Any], trained: Path, cllm: Any
) -> None:
    result = cllm("compress", trained, "-q", *arguments)
    assert result.code == 2
    assert "predict" in result.err
    assert result.err.count("\n") == 1
    with pytest.raises(UsageError, match="leave out"):
        compress_run(trained, Settings(method="fp16"), Silent(), predict=True)


def layer_of(rows: int, columns: int) -> Layer:
    """A layer whose inputs are independent."""
    linear, eye = torch.nn.Linear(columns, rows, bias=False), torch.eye(columns).double()
    return Layer("layers.0.mlp.up", linear, eye, eye, eye, None)


def test_rows_that_all_come_out_as_zeros_lose_all() -> None:
    torch.manual_seed(0)
    settings = Settings(grid="coded", method="babai", bits=2)
    found = outlook(layer_of(16, 24), settings, torch.Generator().manual_seed(0))
    assert found.error > 0.5


@pytest.mark.parametrize("grid", ["int", "coded"])
def test_layers_of_zeros_and_inputs_that_are_never_seen_are_foretold(grid: str) -> None:
    settings = Settings(grid=grid, method="babai", bits=2)
    none = layer_of(16, 24)
    with torch.no_grad():
        none.linear.weight.zero_()
    zeros = torch.zeros(24, 24).double()
    unseen = replace(layer_of(16, 24), fit=zeros, held=zeros, seen=zeros)
    for layer in (none, unseen):
        found = outlook(layer, settings, torch.Generator().manual_seed(0))
        assert found.shrinkage == 0
        assert bool(found.draw(torch.Generator()).isfinite().all())


@pytest.mark.parametrize("bits", [2, 4])
def test_a_draw_has_the_error_that_is_expected(bits: int) -> None:
    torch.manual_seed(0)
    layer = layer_of(16, 24)
    settings = Settings(method="babai", bits=bits)
    found = outlook(layer, settings, torch.Generator().manual_seed(0))
    drawn = [found.draw(torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert found.share(drawn, layer.seen) == pytest.approx(found.error, rel=1e-3)


@pytest.mark.parametrize("lattice", ["z", "e8", "leech"])
def test_rows_that_take_more_than_their_share_are_refused_by_name(lattice: str) -> None:
    settings = Settings(grid="coded", method="babai", bits=0.5, lattice=lattice)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up: nothing can be told from 32 rows"):
        outlook(layer_of(32, 24), settings, torch.Generator())
