"""Whole runs in this process: best and last, early ends, fine-tuning, time budgets."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.core.errors import UserError
from cllm.core.settings import load_config
from cllm.store import checkpoint
from cllm.store.metrics import read_columns, read_lines
from cllm.training import session
from cllm.training.conclude import Outcome
from cllm.training.pace import FEWEST_STEPS, Pace

Start = Callable[..., Outcome]
Resume = Callable[..., Outcome]


def step_of(path: Path) -> int:
    """The step that a link points at."""
    return checkpoint.load(path).step


def test_the_best_and_the_newest_checkpoints_are_kept(
    start: Start, scripted: Callable[..., None]
) -> None:
    scripted([3.0, 2.0, 2.5, 2.4, 2.3, 2.2])
    outcome = start(train__eval_every=2, train__checkpoint_every=1, train__keep_last=3)
    run = outcome.run
    assert run.steps() == [4, 10, 11, 12]
    assert checkpoint.load(run.path, "best").step == 4
    assert step_of(run.checkpoints / "best") == 4
    assert step_of(run.checkpoints / "last") == 12
    assert run.status().facts["step"] == 12
    assert [line["step"] for line in read_lines(run.metrics) if line["kind"] == "test"] == [4]


def test_the_figures_at_the_end_are_those_of_the_best_weights(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rate that grows far too high: the first validation is the best, or nearly.
    outcome = start(
        train__lr=3.0, train__warmup=19, train__steps=20, train__eval_every=2, train__clip=0.0
    )
    scores = read_columns(outcome.run.metrics, "validation")
    best = min(scores["bpb"])
    assert scores["bpb"][-1] > best + 0.1, "this training was to go wrong"
    assert outcome.validation is not None
    assert outcome.validation.bpb == best
    assert outcome.run.status().facts["validation_bpb"] == best
    assert (
        checkpoint.load(outcome.run.path, "best").step == scores["step"][scores["bpb"].index(best)]
    )


def test_patience_stops_training_and_the_best_stays(
    start: Start, scripted: Callable[..., None], told: Any
) -> None:
    scripted([3.0, 2.0, 1.9995, 1.9999, 1.9999])
    outcome = start(
        train__steps=40, train__eval_every=3, train__patience=2, train__min_improvement=0.01
    )
    assert outcome.state == "stopped early"
    status = outcome.run.status()
    assert (status.state, status.facts["step"]) == ("stopped early", 12)
    assert checkpoint.load(outcome.run.path, "best").step == 9, "better is better, if too little"
    assert any("stopped early: 2 validations without" in text for text in told.said)


def test_small_improvements_add_up_to_one(start: Start, scripted: Callable[..., None]) -> None:
    scripted([3.0, 2.995, 2.985, 2.98, 2.97, 2.96])
    outcome = start(train__eval_every=2, train__patience=2, train__min_improvement=0.01)
    assert outcome.state == "finished"


def test_a_run_that_stopped_early_goes_on_when_it_is_asked_to(
    resume: Resume, start: Start, scripted: Callable[..., None], told: Any
) -> None:
    scripted([2.0])
    run = start(train__steps=40, train__eval_every=2, train__patience=2).run
    assert run.status().facts["step"] == 6
    outcome = resume(run.path)
    assert (outcome.state, run.status().facts["step"]) == ("stopped early", 10)


@pytest.mark.parametrize(("bpb", "warned"), [(50.0, True), (0.001, False)])
def test_a_rising_validation_over_a_lower_training_loss_is_warned_of_once(
    bpb: float, warned: bool, start: Start, scripted: Callable[..., None], told: Any
) -> None:
    scripted([bpb * factor for factor in (1, 1.1, 1.2, 1.3, 1.4, 1.5)])
    outcome = start(train__eval_every=2)
    texts = [text for text in told.warnings if "learning its text by heart" in text]
    assert len(texts) == warned
    assert outcome.run.status().facts["warnings"] == told.warnings


def test_the_same_seed_twice_gives_the_same_bits_and_another_one_others(
    start: Start, assert_same_run: Callable[[Path, Path], None], state_of: Callable[..., Any]
) -> None:
    one, two = start("one").run.path, start("two").run.path
    assert_same_run(one, two)
    other = state_of(start("other", train__seed=1).run.path)
    assert not torch.equal(other["weights"]["norm.weight"], state_of(one)["weights"]["norm.weight"])


def test_no_samples_are_written_where_none_are_wanted(start: Start) -> None:
    outcome = start(log__sample_tokens=0)
    assert outcome.samples == ()
    assert "sample" not in {line["kind"] for line in read_lines(outcome.run.metrics)}


def test_batch_norm_trains_and_reports_the_gap_between_its_modes(start: Start, told: Any) -> None:
    outcome = start(model__norm="batchnorm", train__steps=30, train__eval_every=10)
    losses = read_columns(outcome.run.metrics, "train")["loss"]
    assert losses[-1] < losses[0] - 0.5
    gaps = read_columns(outcome.run.metrics, "validation")["mode_gap"]
    assert len(gaps) == 3
    assert all(math.isfinite(gap) and gap != 0 for gap in gaps)
    assert any("nats from train to eval mode" in text for text in told.said)
    saved = checkpoint.load(outcome.run.path).weights
    assert saved["norm.running_mean"].any()


def test_fine_tuning_starts_from_the_weights_and_tokenizer_of_the_parent(
    start: Start, tmp_path: Path, text_of: Callable[..., str], told: Any
) -> None:
    parent = start("parent", train__keep_last=9).run
    best = checkpoint.load(parent.path, "best")
    child = start("child", from_run=parent.path, train__keep_last=9, train__seed=7).run
    first = checkpoint.load(child.path, 0)
    assert first.weights.keys() == best.weights.keys()
    for name, tensor in first.weights.items():
        assert torch.equal(tensor, best.weights[name])
    for moment in first.optimizer["moments"].values():
        assert not any(tensor.any() for tensor in moment.values())
    assert child.tokenizer.read_bytes() == parent.tokenizer.read_bytes()
    assert child.status().facts["parent"] == str(parent.path)
    losses = [read_columns(run.metrics, "train")["loss"] for run in (parent, child)]
    assert losses[1][0] < losses[0][0] - 0.3
    # A checkpoint of the parent is taken as it is.
    early = start("early", from_run=parent.checkpoints / "step-00000004", train__keep_last=9).run
    for name, tensor in checkpoint.load(early.path, 0).weights.items():
        assert torch.equal(tensor, checkpoint.load(parent.path, 4).weights[name])


def test_a_parent_of_another_shape_is_refused(start: Start, told: Any) -> None:
    parent = start("parent").run
    with pytest.raises(UserError, match="another shape of model"):
        start("child", from_run=parent.path, model__d_ff=32)
    assert not Path("child").exists()


def test_a_time_budget_chooses_the_steps_and_the_schedule_with_them(
    start: Start, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Pace(step=1.0, validation=2.0, measuring=0.0)
    monkeypatch.setattr(session, "measure_pace", lambda *arguments: pace)
    monkeypatch.setattr(session.time, "monotonic", lambda: 0.0)
    run = start(seconds=100.0, train__eval_every=10, train__schedule="linear").run
    steps = pace.steps_in(100.0, 10)
    assert steps == int((95 - 6) / 1.2)
    assert load_config(run.config).train.steps == steps
    columns = read_columns(run.metrics, "train")
    assert columns["step"][-1] == run.status().facts["step"] == steps
    assert columns["lr"][-1] == pytest.approx(0.1 * max(columns["lr"]))
    assert any(f"{steps} steps of 1000.0 ms fit into the time left" in text for text in told.said)
    assert not told.warnings


def test_a_time_too_short_is_warned_of_and_trains_the_fewest_steps(start: Start, told: Any) -> None:
    run = start(seconds=0.001).run
    assert run.status().facts["step"] == FEWEST_STEPS
    assert any("the time is too short" in text for text in told.warnings)


def test_without_validation_and_test_the_last_weights_are_taken(start: Start) -> None:
    outcome = start(data__validation=0.0, data__test=0.0)
    assert (outcome.validation, outcome.test) == (None, None)
    assert outcome.run.status().facts["validation_bpb"] is None
    assert checkpoint.load_weights(outcome.run.path).keys()
    assert not (outcome.run.checkpoints / "best").exists()
    assert not read_columns(outcome.run.metrics, "validation")


def test_the_validation_that_is_logged_is_that_of_evaluating_the_checkpoint(
    start: Start,
) -> None:
    import cllm

    for dtype in ("fp32", "bf16"):
        outcome = start(dtype, train__dtype=dtype)
        assert outcome.validation is not None
        run = cllm.load(outcome.run.path)
        before = run.generate("The", max_tokens=20, temperature=0.0)
        again = run.evaluate()
        assert again.bpb == pytest.approx(outcome.validation.bpb, rel=1e-6)
        assert (again.bytes, again.tokens) == (outcome.validation.bytes, outcome.validation.tokens)
        assert run.generate("The", max_tokens=20, temperature=0.0) == before


def test_whoever_reads_a_text_many_times_is_advised(start: Start) -> None:
    """Twelve steps read it less than once, and nothing is said; then it is eight times."""
    assert not start("few").run.status().facts["warnings"]
    many = {"train__steps": 120, "train__eval_every": 120, "train__batch_size": 64}
    facts = start("many", **many, model__context=32).run.status().facts
    assert [text for text in facts["warnings"] if "model.residual_dropout=0.1" in text]
