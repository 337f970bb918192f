"""Whole runs on sampled softmax, with tables by rows, with the similarity loss, with pieces from codes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cllm.core.config import Config
from cllm.core.errors import UsageError
from cllm.store import checkpoint
from cllm.store.metrics import read_columns
from cllm.text.tokenizer import Tokenizer
from cllm.training import resolve, session
from cllm.training.choose import choose
from cllm.training.pieces import incidence_of, merge_pieces
from cllm.training.progress import Reading, figures
from cllm.training.report import write_report

SAMPLED = {"train__loss": "sampled", "train__sampled__candidates": 32}
CODES = {"model__embedding__kind": "composed", "model__embedding__pieces_from": "codes"}
ALL = (
    SAMPLED
    | CODES
    | {
        "train__sampled__sampler": "divisor",
        "train__similarity__weight": 0.5,
        "train__similarity__pairs": 16,
        "train__lazy_rows": "on",
    }
)


@pytest.fixture
def start(
    isolated: Path,
    corpus: Path,
    told: Any,
    config_of: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Path]:
    """Trains a short run into the directory ``name``; without a report."""
    monkeypatch.setattr(session, "write_report", lambda path: None)
    monkeypatch.setattr(resolve, "is_busy", lambda: None)

    def run(name: str, **changes: Any) -> Path:
        changes = {"train__keep_last": 9, "train__checkpoint_every": 3} | changes
        config = config_of(data__paths=(str(corpus),), **changes)
        return session.start(config, told, out=isolated / name).run.path

    return run


def cut_back(run: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of ``step``."""
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    for link in ("best", "last"):
        (run / "checkpoints" / link).unlink(missing_ok=True)
    (run / "checkpoints" / "last").symlink_to(f"step-{step:08}")


@pytest.mark.parametrize("changes", [SAMPLED, ALL, {"model__tie_embeddings": False, **ALL}])
def test_a_resumed_run_gives_the_same_bits(
    changes: dict[str, Any], start: Callable[..., Path], told: Any
) -> None:
    straight, halted = start("straight", **changes), start("halted", **changes)
    cut_back(halted, 3)
    session.resume(halted, (), told)
    one, other = checkpoint.load(straight), checkpoint.load(halted)
    assert one.step == other.step == 12
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, other.weights[name]), name
    for moment, tensors in one.optimizer["moments"].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.optimizer["moments"][moment][name]), name
    columns = (
        ("estimated_loss", "similarity_loss") if changes is not SAMPLED else ("estimated_loss",)
    )
    lines = [read_columns(run / "metrics.jsonl", "train") for run in (straight, halted)]
    for name in columns:
        assert lines[0][name] == lines[1][name]
        assert np.isfinite(lines[0][name]).all()


def test_by_rows_or_not_a_run_ends_alike_and_either_loads(
    start: Callable[..., Path], told: Any
) -> None:
    changes = SAMPLED | {"model__embedding__kind": "composed"}
    lazy = start("lazy", **changes, train__lazy_rows="on")
    dense = start("dense", **changes, train__lazy_rows="off")
    found, wanted = checkpoint.load(lazy).weights, checkpoint.load(dense).weights
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for run, setting in ((lazy, "off"), (dense, "on")):
        cut_back(run, 6)
        session.resume(run, (f"train.lazy_rows={setting}",), told)
    found, again = checkpoint.load(lazy).weights, checkpoint.load(dense).weights
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
        torch.testing.assert_close(again[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_an_estimate_is_called_one_and_scores_are_exact(start: Callable[..., Path]) -> None:
    run = start("run", **SAMPLED)
    train = read_columns(run / "metrics.jsonl", "train")
    assert "estimated_loss" in train
    assert "loss" not in train
    assert "bpb" not in train
    import cllm

    validation = read_columns(run / "metrics.jsonl", "validation")
    scored = cllm.load(run / "checkpoints" / "last").evaluate()
    assert validation["bpb"][-1] == pytest.approx(scored.bpb, rel=1e-5)
    text = write_report(run).read_text(encoding="utf-8")
    assert "an estimate by sampled softmax, 32 candidates (unigram)" in text
    shown = figures(
        Reading(step=1, loss=2.5, bpb=1.5, is_estimate=True, tokens_per_second=950.0), None
    )
    assert shown[:2] == ["estimated loss 2.500", "950 tok/s"]
    assert figures(Reading(step=1, loss=2.5, bpb=1.5), None)[:2] == ["loss 2.500", "1.500 bpb"]


def test_the_exact_loss_is_called_the_loss(start: Callable[..., Path]) -> None:
    run = start("run", train__similarity__weight=0.5, train__similarity__until=0.5)
    train = read_columns(run / "metrics.jsonl", "train")
    assert "loss" in train
    assert "estimated_loss" not in train
    assert train["similarity_weight"][0] == 0.5
    assert train["similarity_weight"][6:] == [0.0] * 6
    assert "weight 0.5, faded at 50% of the steps" in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("own", [True, False])
def test_pieces_from_codes_are_those_of_the_codes(
    own: bool, start: Callable[..., Path], config_of: Callable[..., Config]
) -> None:
    run = start("run", **CODES, model__embedding__own_vectors=own)
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    size = tokenizer.vocab_size
    config = config_of(**CODES, model__vocab_size=size + 3, model__embedding__own_vectors=own)
    found = incidence_of(tokenizer, config)
    assert found.shape[0] == size + 3
    weights = checkpoint.load(run).weights
    assert len(weights["embedding.weight"]) == found.shape[1] - 3
    assert np.array_equal(weights["embedding.incidence.indices"].numpy(), found.indices[:-3])
    if own:
        merges = merge_pieces(tokenizer, size + 3)
        assert found.shape[1] > merges.shape[1], "variants and stems have pieces, too"
        assert found.nnz > merges.nnz
    import cllm

    model = cllm.load(run).model
    table = torch.from_numpy(found[:-3, :-3].toarray()).float() @ weights["embedding.weight"]
    torch.testing.assert_close(model.embedding.table().detach(), table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__loss": "sampled", "model__vocab_size": 900}, "train.loss = 'exact'"),
        ({"train__lazy_rows": "on"}, "model.tie_embeddings = false or train.loss = 'sampled'"),
        ({**SAMPLED, "train__lazy_rows": "on", "train__betas": (0.95, 0.9)}, "train.betas"),
        ({"model__embedding__pieces_from": "codes"}, "model.embedding.kind = 'composed'"),
        ({"train__sampled__candidates": 0}, "train.sampled.candidates"),
        ({"train__similarity__until": 0.0}, "train.similarity.until"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], said: str, config_of: Callable[..., Config]
) -> None:
    with pytest.raises(UsageError, match=said.replace(".", r"\.")):
        config_of(**changes)


def test_too_many_candidates_for_the_tokenizer_are_refused(start: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="is no sample of a vocabulary of 300"):
        start("run", train__loss="sampled", train__sampled__candidates=300)


@pytest.mark.parametrize(
    "changes",
    [
        {**SAMPLED, "train__sampled__sampler": "divisor"},
        {"train__similarity__weight": 0.1},
        {"model__embedding__kind": "composed"},
        CODES,
    ],
)
def test_a_tokenizer_without_merges_has_no_codes(
    changes: dict[str, Any], start: Callable[..., Path]
) -> None:
    # 257 tokens: the bytes and the end token, and not a merge.
    with pytest.raises(UsageError, match="no merge list"):
        start("run", tokenizer__vocab_size=257, model__embedding__init="normal", **changes)


def test_other_pieces_are_refused_on_resume(start: Callable[..., Path], told: Any) -> None:
    run = start("run", **CODES)
    with pytest.raises(UsageError, match="cannot change on resume"):
        session.resume(run, ("model.embedding.pieces_from=merges",), told)


def test_what_auto_means_for_rows(config_of: Callable[..., Config]) -> None:
    def choice(**changes: Any) -> str:
        config = config_of(**{"train__compile": "off", "model__vocab_size": 300} | changes)
        return choose(config).config.train.lazy_rows

    large = {"model__vocab_size": 70_000}
    assert choice(**large) == "off", "a tied table is used whole"
    assert choice(**large, model__tie_embeddings=False) == "on"
    assert choice(**large, **SAMPLED) == "on"
    assert choice(**SAMPLED) == "off"
    assert choice(**large, **SAMPLED, train__betas=(0.95, 0.9)) == "off"
    assert choice(**SAMPLED, train__lazy_rows="on") == "on"
