"""``model.embedding.init``: what a new run's tables begin with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cllm.core.config import Config
from cllm.core.errors import UsageError
from cllm.store import checkpoint
from cllm.text.tokenizer import Tokenizer
from cllm.training import resolve, session
from cllm.training.build import build
from cllm.training.pieces import merge_pieces

TABLE = "embedding.weight"
STARTED = {TABLE, "layers.1.mlp.gate_up.weight", "layers.1.mlp.out.weight"}
"""What a corpus start fills; all else begins as it does without."""


@pytest.fixture
def begin(
    isolated: Path,
    corpus: Path,
    told: Any,
    config_of: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Path]:
    """Trains a short run with the given start, and returns its directory."""
    monkeypatch.setattr(session, "write_report", lambda path: None)
    monkeypatch.setattr(resolve, "is_busy", lambda: None)

    def run(name: str, init: str, from_run: Path | None = None, **changes: Any) -> Path:
        changes = {"train__steps": 4, "train__checkpoint_every": 2, "train__keep_last": 9} | changes
        paths = changes.pop("data__paths", (str(corpus),))
        config = config_of(data__paths=paths, model__embedding__init=init, **changes)
        return session.start(config, told, out=isolated / name, from_run=from_run).run.path

    return run


def first(path: Path) -> dict[str, Tensor]:
    """Weights before the first step."""
    return checkpoint.load(path, 0).weights


def rms(table: Tensor) -> float:
    return float(table.square().mean().sqrt())


def test_a_corpus_start_is_used_and_the_same_each_time(begin: Callable[..., Path]) -> None:
    normal, one, two = begin("a", "normal"), begin("b", "corpus"), begin("c", "corpus")
    assert torch.equal(first(one)[TABLE], first(two)[TABLE])
    assert not torch.equal(first(one)[TABLE], first(normal)[TABLE])
    for name, tensor in first(normal).items():
        assert name in STARTED or torch.equal(tensor, first(one)[name]), name
    for name, tensor in checkpoint.load(one).weights.items():
        assert torch.equal(tensor, checkpoint.load(two).weights[name])


def test_its_scale_is_a_setting(begin: Callable[..., Path]) -> None:
    table = first(begin("a", "corpus", model__embedding__init_std=0.07))[TABLE]
    assert rms(table) == pytest.approx(0.07, rel=0.1)


@pytest.mark.parametrize(("lattice", "coarse"), [("z", 0.08), ("e8", 0.12)])
def test_a_lattice_on_which_the_start_is_zero_is_refused_and_one_near_it_warned_of(
    lattice: str, coarse: float, begin: Callable[..., Path], told: Any, isolated: Path
) -> None:
    def warned(step: float) -> bool:
        changes = {"model__embedding__lattice": lattice, "model__embedding__lattice_step": step}
        begin(f"step-{step}", "normal", **changes)
        return any("of the embedding begins at 0" in text for text in told.warnings)

    assert not warned(0.01)
    assert warned(coarse)
    with pytest.raises(UsageError, match=r"lattice_step = 0.5 is too coarse: all of the embedding"):
        warned(0.5)
    assert not (isolated / "step-0.5").exists()


@pytest.mark.parametrize("init", ["corpus", "crystal"])
def test_a_head_of_its_own_starts_so_too(begin: Callable[..., Path], init: str) -> None:
    weights = first(begin("a", init, model__tie_embeddings=False))
    assert torch.equal(weights[TABLE], weights["head.weight"])


def test_the_arithmetics_copy_of_the_weights_starts_so_too(
    begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watch(config: Config, run: Any, dataset: Any, model: Any, step: Any, *rest: Any) -> None:
        seen.append(step.arena.layout.views(step.arena.compute)[TABLE].float())
        seen.append(model.embedding.weight.detach())
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "train_run", watch)
    with pytest.raises(KeyboardInterrupt):
        begin("a", "corpus", train__dtype="bf16")
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-2, atol=1e-6)


def test_resuming_keeps_the_start_and_its_bits(
    begin: Callable[..., Path], told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = begin("straight", "corpus", train__steps=6)
    halted = begin("halted", "corpus", train__steps=6, train__checkpoint_every=3)
    import shutil

    shutil.rmtree(halted / "checkpoints" / "step-00000006")
    for link in ("best", "last"):
        (halted / "checkpoints" / link).unlink()
        (halted / "checkpoints" / link).symlink_to("step-00000003")
    session.resume(halted, (), told)
    for name, tensor in checkpoint.load(straight).weights.items():
        assert torch.equal(tensor, checkpoint.load(halted).weights[name]), name


def test_fine_tuning_begins_with_the_parents_table(begin: Callable[..., Path]) -> None:
    parent = begin("parent", "corpus")
    child = begin("child", "corpus", from_run=parent)
    assert torch.equal(first(child)[TABLE], checkpoint.load(parent, "best").weights[TABLE])


def test_a_tiny_corpus_with_fewer_tokens_than_the_table_is_wide(
    begin: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "tiny.txt").write_text("abcab " * 4000, encoding="utf-8")
    path = begin("a", "corpus", data__paths=(str(tmp_path / "tiny.txt"),))
    table = first(path)[TABLE]
    assert table.isfinite().all()
    assert rms(table) == pytest.approx(0.08, rel=0.3)


def test_merge_pieces_are_the_merge_tree(corpus: Path) -> None:
    text = corpus.read_text(encoding="utf-8")
    tokenizer = Tokenizer.train([text], vocab_size=300)
    pieces = merge_pieces(tokenizer, 310).toarray()
    assert np.array_equal(np.diag(pieces), np.ones(310))
    first_name, second_name = tokenizer.merges()[-1]
    ids = {tokenizer.token_name(i): i for i in range(tokenizer.vocab_size)}
    whole, one, two = ids[first_name + second_name], ids[first_name], ids[second_name]
    expected = np.maximum(pieces[one], pieces[two])
    expected[whole] = 1
    assert np.array_equal(pieces[whole], expected)


def test_a_model_without_a_corpus_is_random_with_the_usual_scale() -> None:
    model, _ = build(
        Config().replace(
            model__vocab_size=400,
            train__threads=1,
            train__loss_chunk=0,
            train__device="cpu",
            train__dtype="fp32",
            train__attention="matmul",
            train__compile="off",
        )
    )
    assert rms(model.embedding.weight.detach()) == pytest.approx(0.02, rel=0.05)
