"""Tables that were trained on a lattice are stored as the integers that they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cllm as package
from cllm.compress.command import compress_run
from cllm.compress.own_points import own_points
from cllm.compress.settings import Settings
from cllm.core.errors import UsageError, UserError
from cllm.store.container import Container
from cllm.training.progress import Silent

Make = Callable[..., Path]


@pytest.fixture
def run_with(isolated: Path, corpus: Path, fast: dict[str, Any]) -> Make:
    """Trains for a moment with fields of ``model.embedding``."""

    def make(**fields: Any) -> Path:
        settings = {k.replace(".", "__"): v for k, v in (fast | {"train.steps": 6}).items()}
        settings |= {f"model__embedding__{name}": value for name, value in fields.items()}
        out = isolated / "run"
        package.train(data=corpus, out=out, quiet=True, **settings)
        return out

    return make


def compressed(run: Path, progress: Silent, **changes: Any) -> Path:
    """A file of ``run``, the layers only cast in effect: eight bits, rounded to the nearest."""
    torch.set_num_threads(1)
    settings = Settings(bits=8, method="rtn", tokens=256, **changes)
    return compress_run(run, settings, progress, out=run / "out.cllm").path


@pytest.mark.parametrize(
    "fields",
    [
        {"lattice": "z"},
        {"lattice": "e8"},
        {"lattice": "z", "kind": "reduced", "rank": 16},
        {"lattice": "reduced", "kind": "reduced", "rank": 16, "lattice_step": 0.02},
    ],
    ids=str,
)
def test_the_points_come_back_to_the_bit_in_fewer_bytes(
    fields: dict[str, Any], run_with: Make, told: Any
) -> None:
    run = run_with(**fields)
    path = compressed(run, told, table="auto")
    assert any(
        "the points of the lattice that they were trained on, " in line for line in told.said
    )
    trained, stored = package.load(run).model.embedding, package.load(path).model.embedding
    assert torch.equal(stored.core(), trained.core())
    assert torch.equal(stored.weight, trained.core()), "what is read is what was snapped"
    size = Container.open(path).sizes()["embedding.weight"]
    bits = 8 * size / trained.weight.numel()
    assert bits < 8, "a byte for integers of a few steps would be too many"


def test_points_are_stored_where_asked_only(run_with: Make) -> None:
    run = run_with(lattice="z")
    kinds = {}
    for table in ("own", "lattice", "int8"):
        kinds[table] = Container.open(compressed(run, Silent(), table=table)).header.weights
    assert [kinds[t]["embedding.weight"].kind for t in kinds] == ["points", "table", "table"]


def test_points_that_take_more_than_a_byte_are_rounded_anew(run_with: Make, told: Any) -> None:
    run = run_with(lattice="z", lattice_step=1e-4)
    path = compressed(run, told, table="auto")
    assert Container.open(path).header.weights["embedding.weight"].kind == "table"
    (said,) = (line for line in told.said if line.startswith("tables: not the points"))
    assert said.endswith("but 6")


def test_bits_that_are_asked_for_are_those_of_the_table(
    run_with: Make, cllm: Callable[..., Any]
) -> None:
    run = run_with(lattice="z")
    quick = ("--method", "rtn", "--bits", "8", "--tokens", "256", "--quiet")
    sizes = {}
    for name, asked in {"own": (), "3": ("--table-bits", "3"), "6": ("--table-bits", "6")}.items():
        made = cllm("compress", run, *quick, *asked, "--out", f"{name}.cllm")
        assert made.code == 0, made.err
        sizes[name] = Container.open(f"{name}.cllm").sizes()["embedding.weight"]
    assert sizes["3"] < 0.6 * sizes["6"]
    assert Container.open("own.cllm").header.weights["embedding.weight"].kind == "points"


def test_a_table_that_snaps_to_zero_has_no_error(run_with: Make) -> None:
    embedding = package.load(run_with(lattice="z")).model.embedding
    with torch.no_grad():
        embedding.weight.mul_(1e-6)
    embedding.after_step()
    piece = own_points(embedding)
    assert not piece.values.any()
    assert piece.figures["error"] == 0.0


@pytest.mark.parametrize(
    "fields", [{}, {"kind": "composed", "lattice": "z"}], ids=["no lattice", "composed"]
)
def test_what_has_no_points_of_its_own_is_refused_or_stored_as_ever(
    fields: dict[str, Any], run_with: Make
) -> None:
    run = run_with(**fields)
    with pytest.raises(
        UsageError, match="--table own stores tables that were trained on a lattice"
    ):
        compressed(run, Silent(), table="own")
    assert not (run / "out.cllm").exists()
    path = compressed(run, Silent(), table="auto")
    assert Container.open(path).header.weights["embedding.weight"].kind == "table"


@pytest.mark.parametrize("value", [torch.nan, 1e9], ids=["NaN", "too large"])
def test_coordinates_without_a_point_are_refused(value: float, run_with: Make) -> None:
    table = package.load(run_with(lattice="z")).model.embedding
    with torch.no_grad():
        table.weight[3, 2] = value
    table.after_step()
    with pytest.raises(UserError, match="no points of its lattice: they are NaN or too large"):
        own_points(table)


def test_recovery_leaves_points_where_they_are(run_with: Make) -> None:
    run = run_with(lattice="z")
    settings = Settings(bits=4, method="rtn", tokens=256, recover=3, table="own")
    torch.set_num_threads(1)
    path = compress_run(run, settings, Silent(), out=run / "out.cllm").path
    ours, theirs = package.load(path).model.embedding, package.load(run).model.embedding
    assert torch.equal(ours.core(), theirs.core())
