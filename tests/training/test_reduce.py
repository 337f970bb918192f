"""A run with its table reduced: what is retained, what stays the same, and that training goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cllm
from cllm.api import Run
from cllm.compress.settings import Settings
from cllm.compress.source import open_source as compress_source
from cllm.core.config import Config
from cllm.core.errors import UsageError, UserError
from cllm.core.settings import load_config
from cllm.export.source import open_source as export_source
from cllm.model.rebase import basis_facts
from cllm.store import checkpoint
from cllm.store.metrics import read_lines
from cllm.text.dataset import load_prepared
from cllm.training import session
from cllm.training.progress import Silent
from cllm.training.tables import metrics_of

Reduce = Callable[..., Run]


def test_the_table_is_the_best_of_its_rank_and_all_else_stays(
    trained: Path, reduced: Reduce, told: Any
) -> None:
    before, after = cllm.load(trained), reduced(trained, rank=16)
    table = before.model.embedding.table().detach()
    values = torch.linalg.svdvals(table.double()).square()
    lost = (after.model.embedding.table().detach() - table).square().sum()
    assert lost.item() == pytest.approx(values[16:].sum().item(), rel=1e-4)
    assert any("rank 16 of 64 retains" in line for line in told.said)
    for name, tensor in after.model.state_dict().items():
        if not name.startswith("embedding."):
            assert torch.equal(tensor, before.model.state_dict()[name])
    assert after.config.model.embedding.rank == 16
    assert after.directory.status().state == "finished"
    # What was scored at once is what a later evaluation finds.
    found = after.evaluate(split="validation").bpb
    assert found == pytest.approx(after.directory.status().facts["validation_bpb"], rel=1e-6)
    assert "Token table" in after.report.read_text(encoding="utf-8")


def test_a_share_to_retain_chooses_the_rank(trained: Path, reduced: Reduce) -> None:
    embedding = reduced(trained, retain=0.9).model.embedding
    table = cllm.load(trained).model.embedding.table().detach()
    kept = embedding.table().detach().square().sum() / table.square().sum()
    assert kept >= 0.9
    values = torch.linalg.svdvals(table.double()).square()
    assert values[: embedding.basis.shape[0] - 1].sum() / values.sum() < 0.9


def test_lattice_reduction_of_a_trained_basis_changes_no_score(
    isolated: Path, corpus: Path, reduced: Reduce, told: Any, config_of: Callable[..., Config]
) -> None:
    config = config_of(
        data__paths=(str(corpus),), model__embedding__kind="reduced", model__embedding__rank=12
    )
    path = session.start(config, told, out=isolated / "run").run.path
    first = cllm.load(path)
    assert first.directory.status().facts["table"]["rank"] == 12
    again = reduced(path, reduction="lll")
    torch.testing.assert_close(
        again.model.embedding.table(), first.model.embedding.table(), rtol=1e-4, atol=1e-5
    )
    assert again.evaluate().bpb == pytest.approx(first.evaluate().bpb, rel=1e-5)
    assert any("orthogonality defect 2^" in line for line in told.said)


def test_a_run_with_settings_that_do_nothing_is_still_loaded_and_gone_on_with(
    isolated: Path, corpus: Path, reduced: Reduce, told: Any, config_of: Callable[..., Config]
) -> None:
    config = config_of(data__paths=(str(corpus),), train__steps=4)
    path = session.start(config, told, out=isolated / "run").run.path
    text = (path / "run.toml").read_text(encoding="utf-8")
    idle = text.replace("lattice_step = 0.01", "lattice_step = 0.5").replace(
        "own_vectors = true", "own_vectors = false"
    )
    assert idle.count("0.5\n") == text.count("0.5\n") + 1
    (path / "run.toml").write_text(idle, encoding="utf-8")
    assert cllm.load(path).evaluate().bpb > 0
    reduced(path, rank=8)
    again = session.start(load_config(path / "run.toml"), told, out=isolated / "on", from_run=path)
    assert again.state == "finished"


def test_a_checkpoint_is_reduced_beside_its_own_score(
    isolated: Path, corpus: Path, reduced: Reduce, told: Any, config_of: Callable[..., Config]
) -> None:
    config = config_of(data__paths=(str(corpus),), train__eval_every=4, train__keep_last=9)
    path = session.start(config, told, out=isolated / "run").run.path
    lines = {
        line["step"]: line["bpb"]
        for line in read_lines(path / "metrics.jsonl")
        if line["kind"] == "validation"
    }
    step = min(lines)
    reduced(path / "checkpoints" / f"step-{step:08d}", "early", rank=8)
    said = [line for line in told.said if line.endswith("bits per byte of validation text")]
    assert f"{lines[step]:.4f}" in said[-1]
    reduced(path / "checkpoints" / "step-00000000", "start", rank=8)
    said = [line for line in told.said if line.endswith("bits per byte of validation text")]
    assert len(said) == 1, "the start was not validated"


def test_without_steps_the_report_has_the_scores_all_the_same(
    trained: Path, reduced: Reduce
) -> None:
    found = reduced(trained, rank=8)
    bpb = found.directory.status().facts["validation_bpb"]
    assert f"| validation, best | 0 | {bpb:.4g}" in found.report.read_text(encoding="utf-8")


def test_what_asks_for_nothing_is_refused(trained: Path, reduced: Reduce, isolated: Path) -> None:
    again = reduced(trained, "once", rank=8).path
    before = sorted(isolated.iterdir())
    with pytest.raises(UsageError, match=r"nothing is asked for: give --rank.*--then-train"):
        reduced(again, "twice")
    with pytest.raises(
        UsageError, match=r"--metric is of a lattice reduction: give --reduction lll"
    ):
        reduced(again, "twice", metric="hidden")
    assert sorted(isolated.iterdir()) == before


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ('kind = "dense"', 'kind = "reduced"'),
        ('kind = "dense"', 'kind = "composed"'),
        ("d_ff = ", "d_ff = 1"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused_by_every_reader(
    was: str, now: str, trained: Path, reduced: Reduce, isolated: Path
) -> None:
    path = isolated / "altered"
    shutil.copytree(trained, path)
    text = (path / "run.toml").read_text(encoding="utf-8")
    assert was in text
    (path / "run.toml").write_text(text.replace(was, now), encoding="utf-8")
    for read in (
        lambda: cllm.load(path).evaluate(),
        lambda: reduced(path, "none", rank=8),
        lambda: export_source(path),
        lambda: compress_source(path, Settings(tokens=512), Silent()),
    ):
        with pytest.raises(UserError, match=r"do not fit together: one was altered"):
            read()
    assert not (isolated / "none").exists()


def test_under_the_hidden_metric_another_basis_of_the_same_table_comes_out(
    trained: Path, reduced: Reduce, told: Any
) -> None:
    plain = reduced(trained, "plain", rank=12, reduction="lll")
    assert told.said[-1].startswith("embedding basis by lll: ")
    found = reduced(trained, "hidden", rank=12, reduction="lll", metric="hidden")
    assert "embedding basis by lll under the metric of hidden states: " in told.said[-1]
    ours, theirs = found.model.embedding, plain.model.embedding
    torch.testing.assert_close(ours.table(), theirs.table(), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours.basis.abs(), theirs.basis.abs(), rtol=1e-2)
    assert found.evaluate().bpb == pytest.approx(plain.evaluate().bpb, rel=1e-5)
    facts = found.directory.status().facts["table"]
    assert facts["metric of the basis"] == "hidden states"
    # Reduced already, under this metric; under the identity it is not.
    assert facts["basis"]["log2_defect"] == pytest.approx(
        facts["basis after lll"]["log2_defect"], abs=0.1
    )
    assert basis_facts(ours.basis).log2_defect > basis_facts(theirs.basis).log2_defect
    assert "hidden states" in found.report.read_text(encoding="utf-8")
    start = found.directory.status().facts["rebased"]
    before, after = (figures["log2_defect"] for figures in start.values())
    assert before > after + 0.05
    assert after == pytest.approx(facts["basis"]["log2_defect"], abs=0.1)
    said = found.report.read_text(encoding="utf-8")
    assert f"| embedding basis at the start | defect 2^{before}" in said
    assert f"after lll under the metric of hidden states | defect 2^{after}" in said
    assert load_config(found.directory.config).model.embedding.reduction_metric == "hidden"


def test_tables_of_their_own_have_metrics_of_their_own(
    corpus: Path, told: Any, config_of: Callable[..., Config], isolated: Path
) -> None:
    fields = {"kind": "reduced", "rank": 8, "reduction": "lll", "reduction_metric": "hidden"}
    config = config_of(
        data__paths=(str(corpus),),
        model__tie_embeddings=False,
        train__steps=2,
        **{f"model__embedding__{name}": value for name, value in fields.items()},
    )
    run = cllm.load(session.start(config, told, out=isolated / "run").run.path)
    tokens = load_prepared(run.directory.data).train
    metrics = metrics_of(run.model, run.config.model.embedding, tokens)
    assert "embedding" not in metrics, "no score comes of it: the identity"
    assert np.trace(metrics["head"]) == pytest.approx(64)
    assert np.linalg.cond(metrics["head"]) > 10
    said = [line for line in told.said if " basis by lll" in line]
    assert [line.split(":")[0] for line in said] == [
        "embedding basis by lll",
        "head basis by lll under the metric of hidden states",
    ]
    assert "metric of the basis" not in run.directory.status().facts["table"]


def test_training_goes_on_in_the_reduced_space(trained: Path, reduced: Reduce) -> None:
    start, end = reduced(trained, "start", rank=8), reduced(trained, "end", rank=8, then_train=20)
    assert end.config.train.steps == 20
    assert end.evaluate().bpb < start.evaluate().bpb
    saved = checkpoint.load(end.path)
    shapes = {name: moments.shape for name, moments in saved.optimizer["moments"]["mean"].items()}
    vocab = end.config.model.vocab_size
    assert shapes["embedding.weight"] == (vocab, 8)
    assert shapes["embedding.basis"] == (8, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "reduced", "rank": 12, "lattice": "reduced", "lattice_step": 0.02},
        {"kind": "dense", "lattice": "e8"},
    ],
    ids=["reduced", "e8"],
)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(
    changes: dict[str, Any],
    isolated: Path,
    corpus: Path,
    told: Any,
    config_of: Callable[..., Config],
    assert_same_run: Callable[[Path, Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = {f"model__embedding__{name}": value for name, value in changes.items()}
    config = config_of(data__paths=(str(corpus),), **fields)
    straight = session.start(config, told, out=isolated / "straight").run.path
    saved = session.Trainer.save

    def interrupted(trainer: session.Trainer, **how: bool) -> None:
        saved(trainer, **how)
        if trainer.standing.step == 4:
            raise RuntimeError("pulled the plug")

    with monkeypatch.context() as patch:
        patch.setattr(session.Trainer, "save", interrupted)
        with pytest.raises(RuntimeError, match="plug"):
            session.start(config, told, out=isolated / "stopped")
    session.resume(isolated / "stopped", (), told)
    assert_same_run(isolated / "stopped", straight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, UsageError, "no basis yet: give --rank N or --retain SHARE"),
        ({"rank": 8, "retain": 0.5}, UsageError, "not both"),
        ({"retain": 1.5}, UsageError, "share to retain"),
        ({"rank": 65}, UsageError, "rank = 65 is above model.d_model = 64"),
        ({"rank": 60, "reduction": "hkz"}, UserError, "50 are in reach; use bkz"),
        ({"rank": 8, "metric": "hidden"}, UsageError, "give --reduction lll"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    trained: Path,
    reduced: Reduce,
    isolated: Path,
) -> None:
    with pytest.raises(error, match=message):
        reduced(trained, **options)
    assert not (isolated / "reduced").exists()


@pytest.mark.parametrize("options", [{"rank": 8}, {"retain": 0.9}], ids=str)
@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.nan, "1 entries .* NaN or infinite; name an earlier"), (0, "zero")],
)
def test_a_table_that_is_spoiled_is_refused_and_leaves_nothing(
    options: dict[str, Any],
    value: float,
    message: str,
    trained: Path,
    reduced: Reduce,
    isolated: Path,
) -> None:
    path = isolated / "spoiled"
    shutil.copytree(trained, path, symlinks=True)
    saved = checkpoint.load(path)
    table = saved.weights["embedding.weight"].clone()
    if value == 0:
        table.zero_()
    table[3, 2] = value
    checkpoint.save(
        path,
        saved.step,
        weights=saved.weights | {"embedding.weight": table},
        optimizer=saved.optimizer,
        state=saved.state,
        keep_last=1,
        best=True,
    )
    with pytest.raises(UserError, match=message):
        reduced(path, **options)
    assert not (isolated / "reduced").exists()


def test_another_kind_on_a_resume_is_refused_and_reduce_is_named(trained: Path) -> None:
    with pytest.raises(UsageError, match="`cllm reduce` makes a run with reduced tables"):
        session.resume(trained, ["model.embedding.kind=reduced"], Silent())
    kind = load_config(trained / "run.toml").model.embedding.kind
    assert kind == "dense"


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "composed"},
        {"kind": "composed", "own_vectors": False, "init": "corpus"},
        {"kind": "composed+reduced", "rank": 8, "init": "corpus", "lattice": "z"},
    ],
    ids=str,
)
def test_a_composed_run_trains_loads_and_resumes_to_the_same_bits(
    changes: dict[str, Any],
    isolated: Path,
    corpus: Path,
    told: Any,
    config_of: Callable[..., Config],
    assert_same_run: Callable[[Path, Path], None],
) -> None:
    fields = {f"model__embedding__{name}": value for name, value in changes.items()}
    config = config_of(data__paths=(str(corpus),), **fields)
    straight = session.start(config, told, out=isolated / "straight").run
    losses = [line["loss"] for line in read_lines(straight.metrics) if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    run = cllm.load(straight.path)
    assert run.evaluate().bpb == pytest.approx(straight.status().facts["validation_bpb"], rel=1e-6)
    embedding = run.model.embedding
    own = changes.get("own_vectors", True)
    assert (embedding.weight.shape[0] < embedding.incidence.tokens) is not own
    facts = straight.status().facts["table"]
    # Tied, one micro-batch: of a step's two reads the second finds it; validation's all do.
    assert 0.5 <= facts["core_hit_rate"] < 1
    halted = session.start(config, told, out=isolated / "halted").run.path
    shutil.rmtree(halted / "checkpoints" / "step-00000012")
    for link in ("best", "last"):
        (halted / "checkpoints" / link).unlink()
        (halted / "checkpoints" / link).symlink_to("step-00000008")
    session.resume(halted, (), told)
    assert_same_run(halted, straight.path)


def test_pieces_are_the_tokenizers_and_no_others(
    isolated: Path, corpus: Path, told: Any, config_of: Callable[..., Config]
) -> None:
    config = config_of(
        data__paths=(str(corpus),),
        model__embedding__kind="composed",
        model__embedding__pieces=7,
    )
    with pytest.raises(UsageError, match=r"pieces = 7, but this tokenizer gives \d+; leave it out"):
        session.start(config, told, out=isolated / "run")
