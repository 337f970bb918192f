"""Reduced tables of a run whose coordinates are on a lattice, and what needs fpylll."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cllm
from cllm.api import Run
from cllm.core.config import Config
from cllm.core.errors import UsageError, UserError
from cllm.core.settings import merge
from cllm.training import session

Reduce = Callable[..., Run]


@pytest.mark.parametrize("lattice", ["z", "reduced"])
def test_coordinates_on_a_lattice_stay_there_when_their_basis_is_reduced(
    lattice: str,
    isolated: Path,
    corpus: Path,
    reduced: Reduce,
    told: Any,
    config_of: Callable[..., Config],
) -> None:
    fields = {"kind": "reduced", "rank": 12, "lattice": lattice, "lattice_step": 0.05}
    config = config_of(
        data__paths=(str(corpus),),
        train__keep_last=9,
        **{f"model__embedding__{name}": value for name, value in fields.items()},
    )
    path = session.start(config, told, out=isolated / "run").run.path
    first = cllm.load(path).model.embedding
    again = reduced(path, reduction="lll", metric="hidden").model.embedding
    assert not torch.allclose(again.basis, first.basis, atol=1e-2), "another basis"
    points = again.core() / 0.05
    torch.testing.assert_close(points, points.round(), rtol=0, atol=1e-4)
    torch.testing.assert_close(again.table(), first.table(), rtol=1e-4, atol=1e-5)
    # From the start of a run, too: what is drawn and snapped is rewritten.
    rewritten = merge(
        config,
        {"model.embedding.reduction": "lll", "model.embedding.reduction_metric": "hidden"},
    )
    other = session.start(rewritten, told, out=isolated / "rewritten").run.path
    starts = [
        cllm.load(run / "checkpoints" / "step-00000000").model.embedding.table()
        for run in (path, other)
    ]
    torch.testing.assert_close(starts[1], starts[0], rtol=1e-4, atol=1e-5)


def test_points_of_e8_and_sums_of_points_are_not_reduced(
    isolated: Path, corpus: Path, reduced: Reduce, told: Any, config_of: Callable[..., Config]
) -> None:
    fields = {"kind": "reduced", "rank": 16, "lattice": "e8"}
    config = config_of(
        data__paths=(str(corpus),),
        train__steps=2,
        **{f"model__embedding__{name}": value for name, value in fields.items()},
    )
    path = session.start(config, told, out=isolated / "run").run.path
    with pytest.raises(UsageError, match="would change a table whose coordinates are points of E8"):
        reduced(path, reduction="lll")
    composed = config_of(
        data__paths=(str(corpus),),
        model__embedding__kind="composed+reduced",
        model__embedding__lattice="z",
        model__embedding__reduction="lll",
    )
    with pytest.raises(ValueError, match="whose coordinates are sums of pieces on a lattice"):
        session.start(composed, told, out=isolated / "composed")
    assert not (isolated / "composed").exists()


def test_without_fpylll_a_reduced_table_trains_and_only_reduction_is_refused(
    isolated: Path,
    corpus: Path,
    told: Any,
    config_of: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "fpylll", None)
    fields = {"model__embedding__kind": "reduced", "model__embedding__rank": 8}
    plain = config_of(data__paths=(str(corpus),), train__steps=2, **fields)
    run = session.start(plain, told, out=isolated / "run").run
    assert run.status().state == "finished"
    assert "basis" not in run.status().facts["table"]
    asked = config_of(data__paths=(str(corpus),), **fields, model__embedding__reduction="lll")
    with pytest.raises(UserError, match="'lll' needs fpylll: pip install fpylll"):
        session.start(asked, told, out=isolated / "asked")
    assert not (isolated / "asked").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["dense", "composed+reduced"])
def test_a_tables_bytes_are_those_of_a_checkpoint(
    kind: str, tied: bool, isolated: Path, corpus: Path, told: Any, config_of: Callable[..., Config]
) -> None:
    config = config_of(
        data__paths=(str(corpus),),
        train__steps=2,
        model__tie_embeddings=tied,
        model__embedding__kind=kind,
        **({} if kind == "dense" else {"model__embedding__rank": 8}),
    )
    run = session.start(config, told, out=isolated / "run").run
    stored = load_file(run.path / "checkpoints" / "last" / "model.safetensors")
    table = {name: t for name, t in stored.items() if name.startswith(("embedding.", "head."))}
    facts = run.status().facts["table"]
    assert facts["bytes"] == sum(t.nbytes for t in table.values())
    learned = [t.numel() for t in table.values() if t.is_floating_point()]
    assert facts["numbers"] == sum(learned)
    assert f"{facts['bytes']:,}" in (run.path / "report.md").read_text(encoding="utf-8")
