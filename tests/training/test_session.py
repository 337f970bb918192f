"""Whole runs in this process: best and last, early ends, going on, fine-tuning, time budgets."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.core.config import Config
from cllm.core.errors import UsageError, UserError
from cllm.core.settings import load_config
from cllm.store import checkpoint
from cllm.store.metrics import read_columns, read_lines
from cllm.store.run import RunDirectory
from cllm.training import session, trainer
from cllm.training.conclude import Outcome
from cllm.training.evaluate import Evaluation
from cllm.training.pace import FEWEST_STEPS, Pace
from cllm.training.report import write_report
from cllm.training.trainer import DivergedError

Start = Callable[..., Outcome]


@pytest.fixture
def start(
    isolated: Path,
    corpus: Path,
    told: Any,
    config_of: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> Start:
    """Trains into the directory ``name``; without the report, whose pictures take a second."""
    monkeypatch.setattr(session, "write_report", lambda path: None)
    monkeypatch.setattr(session, "is_busy", lambda: None)

    def run(
        name: str = "run",
        *,
        from_run: Path | None = None,
        seconds: float | None = None,
        **changes: Any,
    ) -> Outcome:
        config = config_of(data__paths=(str(corpus),), **changes)
        out = isolated / name
        return session.start(config, told, out=out, from_run=from_run, seconds=seconds)

    return run


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """Makes validations score the given bits per byte in turn, and the last for ever."""

    def install(values: Sequence[float]) -> None:
        left = list(values)

        def evaluate(*arguments: Any, **named: Any) -> Evaluation:
            bpb = left.pop(0) if len(left) > 1 else left[0]
            return Evaluation(loss=bpb, bpb=bpb, perplexity=math.exp(bpb), tokens=1, bytes=1)

        monkeypatch.setattr(trainer, "evaluate", evaluate)

    return install


def resume(path: Path, told: Any, *settings: str) -> Outcome:
    """``cllm train --resume``."""
    return session.resume(path, settings, told)


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
    # A rate far too high after the warm-up: the first validation is the best.
    outcome = start(
        train__lr=3.0, train__warmup=6, train__steps=20, train__eval_every=2, train__clip=0.0
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
    start: Start, scripted: Callable[..., None], told: Any
) -> None:
    scripted([2.0])
    run = start(train__steps=40, train__eval_every=2, train__patience=2).run
    assert run.status().facts["step"] == 6
    outcome = resume(run.path, told)
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


@pytest.mark.parametrize(
    "fields",
    [
        {"model__norm": "batchnorm"},
        {"train__optimizer": "sgd", "train__lr": 0.1, "train__schedule": "wsd"},
        {"train__dtype": "fp16", "model__tie_embeddings": False},
        {"train__attention": "sdpa", "model__positions": "learned", "train__loss_chunk": 50},
    ],
)
@pytest.mark.parametrize("at", [0, 8])
def test_going_on_from_any_checkpoint_leads_to_the_same_bits(
    at: int,
    fields: dict[str, Any],
    start: Start,
    told: Any,
    state_of: Callable[[Path], dict[str, Any]],
    assert_same_state: Callable[[Any, Any], None],
) -> None:
    run = start(train__keep_last=9, model__residual_dropout=0.1, log__every=5, **fields).run
    straight = state_of(run.path)
    assert straight["standing"]["best_step"] > at
    outcome = resume(run.checkpoints / f"step-{at:08d}", told)
    assert outcome.state == "finished"
    assert not told.warnings
    assert_same_state(state_of(run.path), straight)


def test_the_same_seed_twice_gives_the_same_bits_and_another_one_others(
    start: Start, assert_same_run: Callable[[Path, Path], None], state_of: Callable[..., Any]
) -> None:
    one, two = start("one").run.path, start("two").run.path
    assert_same_run(one, two)
    other = state_of(start("other", train__seed=1).run.path)
    assert not torch.equal(other["weights"]["norm.weight"], state_of(one)["weights"]["norm.weight"])


@pytest.mark.parametrize("patience", [0, 1])
def test_a_run_killed_while_it_was_concluded_is_concluded_by_resume(
    patience: int,
    start: Start,
    scripted: Callable[..., None],
    told: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted([2.0])

    def killed(*arguments: Any) -> Outcome:
        raise KeyboardInterrupt

    whole = session.conclude
    monkeypatch.setattr(session, "conclude", killed)
    with pytest.raises(KeyboardInterrupt):
        start(train__eval_every=3, train__patience=patience)
    run = RunDirectory.open("run")
    assert run.status().state == "interrupted"
    before = run.steps()[-1]
    assert before == (6 if patience else 12)
    monkeypatch.setattr(session, "conclude", whole)
    outcome = resume(run.path, told)
    assert outcome.state == ("stopped early" if patience else "finished")
    assert run.status().state == outcome.state
    assert run.steps()[-1] == before
    assert [line["kind"] for line in read_lines(run.metrics)].count("test") == 1


def test_resuming_a_finished_run_without_a_report_writes_it(
    start: Start, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start().run
    monkeypatch.setattr(session, "write_report", write_report)
    with pytest.raises(UsageError, match="has all its 12 steps"):
        resume(run.path, told)
    assert run.report.read_text(encoding="utf-8").startswith("# run")
    assert f"the missing report was written: {run.report}" in told.said


def test_a_finished_run_is_not_resumed_but_for_more_steps(start: Start, told: Any) -> None:
    run = start().run
    with pytest.raises(UsageError, match=r"has all its 12 steps; .*--set train.steps=N"):
        resume(run.path, told)
    outcome = resume(run.path, told, "train.steps=16")
    assert outcome.run.status().facts["step"] == 16
    assert load_config(run.config).train.steps == 16
    assert any("train.steps changed on resume" in text for text in told.warnings)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.validation=0.2", "cannot change on resume; only train.* and log.* can"),
        ("model.d_ff=32", "cannot change on resume; only train.* and log.* can"),
        ("train.optimizer=sgd", "train.optimizer cannot change on resume"),
        ("train.lrr=1", "unknown setting 'train.lrr' (did you mean 'train.lr'?)"),
        ("train.device=cuda", "finds no such device"),
    ],
)
def test_a_resume_that_is_refused_changes_nothing(
    setting: str, message: str, start: Start, told: Any, tmp_path: Path
) -> None:
    if torch.cuda.is_available() and "cuda" in setting:
        pytest.skip("there is a GPU here")
    run = start(train__keep_last=9).run
    shutil.copytree(run.path, tmp_path / "copy", symlinks=True)
    with pytest.raises(UserError) as error:
        resume(run.checkpoints / "step-00000004", told, setting)
    assert message in str(error.value)
    assert "\n" not in str(error.value)

    def contents(path: Path) -> dict[str, bytes]:
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        return {str(file.relative_to(path)): file.read_bytes() for file in files}

    assert contents(run.path) == contents(tmp_path / "copy")


def test_a_run_that_is_being_trained_is_left_alone(start: Start, told: Any) -> None:
    run = start(train__keep_last=9, log__tensorboard=True).run
    before, events = run.config.read_bytes(), sorted(run.tensorboard.iterdir())
    with run.training(), pytest.raises(UserError, match="is being trained by process"):
        resume(run.checkpoints / "step-00000004", told, "train.lr=1e-5")
    assert run.config.read_bytes() == before
    assert run.steps()[-1] == 12
    assert sorted(run.tensorboard.iterdir()) == events


def test_a_run_that_was_trained_on_meanwhile_is_left_alone(
    start: Start, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start().run

    def build_slowly(config: Config, draws: Any) -> Any:
        found = build_at_once(config, draws)
        if run.steps()[-1] == 12:  # while we build, another process goes on
            resume_as_another()
        return found

    def resume_as_another() -> None:
        monkeypatch.setattr(session, "build", build_at_once)
        resume(run.path, told, "train.steps=16")

    build_at_once = session.build
    monkeypatch.setattr(session, "build", build_slowly)
    with pytest.raises(UserError, match="was trained on meanwhile"):
        resume(run.path, told, "train.steps=14")
    assert run.steps()[-1] == 16


def test_the_first_speed_after_a_resume_counts_its_own_tokens() -> None:
    clock = trainer._Clock(tokens=1_000_000)
    seconds = clock.lap()
    assert clock.rate(1_000_500) == pytest.approx(500 / seconds)


def test_no_samples_are_written_where_none_are_wanted(start: Start) -> None:
    outcome = start(log__sample_tokens=0)
    assert outcome.samples == ()
    assert "sample" not in {line["kind"] for line in read_lines(outcome.run.metrics)}


def test_another_thread_count_or_precision_resumes_with_a_warning(start: Start, told: Any) -> None:
    run = start(train__keep_last=9).run
    try:
        resume(run.checkpoints / "step-00000008", told, "train.threads=2", "train.dtype=bf16")
    finally:
        torch.set_num_threads(1)
    for text in ("threads 1 then, 2 now", "dtype fp32 then, bf16 now"):
        assert f"{text}: training goes on, but not to the same bits" in told.warnings
    config = load_config(run.config)
    assert (config.train.threads, config.train.dtype) == (2, "bf16")
    assert run.status().state == "finished"


def test_a_change_to_fp16_begins_with_its_own_loss_scale(start: Start, told: Any) -> None:
    run = start(train__keep_last=9).run
    resume(run.checkpoints / "step-00000008", told, "train.dtype=fp16")
    assert checkpoint.load(run.path).optimizer["counters"]["loss_scale"] == 2.0**14


def truncate(path: Path) -> None:
    """Cut the last tenth off."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_goes_on(
    file: str, damage: Callable[[Path], None], start: Start, told: Any, state_of: Any
) -> None:
    run = start(train__steps=8, log__sample_tokens=0).run
    assert run.steps() == [6, 8]
    straight = state_of(run.path)
    before = run.checkpoints / f"step-{run.steps()[-2]:08d}"
    damage(run.checkpoints / "step-00000008" / file)
    with pytest.raises(UserError) as error:
        resume(run.path, told, "train.steps=9")
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(str(run.checkpoints / "step-00000008" / file))
    command = shlex.split(text.split("the checkpoint before it is whole: ")[1])
    assert command == ["--resume", str(before)]
    resume(Path(command[1]), told)
    again = state_of(run.path)
    assert again["step"] == 8
    for name, tensor in straight["weights"].items():
        assert torch.equal(again["weights"][name], tensor)


def test_divergence_ends_the_run_and_says_what_to_do(start: Start, told: Any) -> None:
    with pytest.raises(DivergedError, match=r"^4 steps in a row .* lower train.lr \(now 1e\+38\)"):
        start(train__lr=1e38, train__max_nonfinite=4, train__steps=30, train__eval_every=2)
    run = RunDirectory.open("run")
    status = run.status()
    assert status.state == "diverged"
    assert "4 steps in a row" in status.reason
    skips = [line["step"] for line in read_lines(run.metrics) if line["kind"] == "skip"]
    assert skips[-4:] == list(range(skips[-1] - 3, skips[-1] + 1))
    assert sum("the step was skipped" in text for text in told.warnings) == len(skips)
    # What was saved before loads, and can be gone on with at a lower rate.
    resume(run.checkpoints / "step-00000000", told, "train.lr=1e-3", "train.steps=6")
    assert run.status().state == "finished"


def test_skipped_steps_that_are_not_in_a_row_do_not_end_the_run(
    start: Start, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer.Trainer._one_step

    def sometimes(self: trainer.Trainer) -> Any:
        if self.standing.step % 3 == 1:
            kept = self.model.norm.weight.detach().clone()
            self.model.norm.weight.data.fill_(float("nan"))
            result = whole(self)
            self.model.norm.weight.data.copy_(kept)
            return result
        return whole(self)

    monkeypatch.setattr(trainer.Trainer, "_one_step", sometimes)
    outcome = start(train__max_nonfinite=2)
    assert outcome.state == "finished"
    assert len(told.warnings) == 4
    counters = checkpoint.load(outcome.run.path).optimizer["counters"]
    assert (counters["applied"], counters["skipped"], counters["in_row"]) == (8, 4, 0)
    assert all(math.isfinite(bpb) for bpb in read_columns(outcome.run.metrics, "validation")["bpb"])


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


@pytest.fixture(autouse=True)
def _no_leftovers(tmp_path: Path) -> Iterator[None]:
    """Whatever a test does, no temporary directory stays."""
    yield
    assert not [path for path in tmp_path.rglob(".tmp-*") if "copy" not in path.parts]
