"""Runs that go on: from any checkpoint, after trouble, or not at all."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Callable
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
from cllm.training.clock import Clock
from cllm.training.conclude import Outcome
from cllm.training.report import write_report
from cllm.training.trainer import DivergedError

Start = Callable[..., Outcome]
Resume = Callable[..., Outcome]


def truncate(path: Path) -> None:
    """Cut the last tenth off."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))


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
    resume: Resume,
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
    outcome = resume(run.checkpoints / f"step-{at:08d}")
    assert outcome.state == "finished"
    assert not told.warnings
    assert_same_state(state_of(run.path), straight)


@pytest.mark.parametrize("patience", [0, 1])
def test_a_run_killed_while_it_was_concluded_is_concluded_by_resume(
    resume: Resume,
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
    outcome = resume(run.path)
    assert outcome.state == ("stopped early" if patience else "finished")
    assert run.status().state == outcome.state
    assert run.steps()[-1] == before
    assert [line["kind"] for line in read_lines(run.metrics)].count("test") == 1


def test_resuming_a_finished_run_without_a_report_writes_it(
    resume: Resume, start: Start, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start().run
    monkeypatch.setattr(session, "write_report", write_report)
    with pytest.raises(UsageError, match="has all its 12 steps"):
        resume(run.path)
    assert run.report.read_text(encoding="utf-8").startswith("# run")
    assert f"the missing report was written: {run.report}" in told.said


def test_a_finished_run_is_not_resumed_but_for_more_steps(
    resume: Resume, start: Start, told: Any
) -> None:
    run = start().run
    with pytest.raises(UsageError, match=r"has all its 12 steps; .*--set train.steps=N"):
        resume(run.path)
    outcome = resume(run.path, "train.steps=16")
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
    resume: Resume, setting: str, message: str, start: Start, told: Any, tmp_path: Path
) -> None:
    if torch.cuda.is_available() and "cuda" in setting:
        pytest.skip("there is a GPU here")
    run = start(train__keep_last=9).run
    shutil.copytree(run.path, tmp_path / "copy", symlinks=True)
    with pytest.raises(UserError) as error:
        resume(run.checkpoints / "step-00000004", setting)
    assert message in str(error.value)
    assert "\n" not in str(error.value)

    def contents(path: Path) -> dict[str, bytes]:
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        return {str(file.relative_to(path)): file.read_bytes() for file in files}

    assert contents(run.path) == contents(tmp_path / "copy")


def test_a_run_that_is_being_trained_is_left_alone(resume: Resume, start: Start, told: Any) -> None:
    run = start(train__keep_last=9, log__tensorboard=True).run
    before, events = run.config.read_bytes(), sorted(run.tensorboard.iterdir())
    with run.training(), pytest.raises(UserError, match="is being trained by process"):
        resume(run.checkpoints / "step-00000004", "train.lr=1e-5")
    assert run.config.read_bytes() == before
    assert run.steps()[-1] == 12
    assert sorted(run.tensorboard.iterdir()) == events


def test_a_run_that_was_trained_on_meanwhile_is_left_alone(
    resume: Resume, start: Start, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start().run

    def build_slowly(config: Config, draws: Any) -> Any:
        found = build_at_once(config, draws)
        if run.steps()[-1] == 12:  # while we build, another process goes on
            resume_as_another()
        return found

    def resume_as_another() -> None:
        monkeypatch.setattr(session, "build", build_at_once)
        resume(run.path, "train.steps=16")

    build_at_once = session.build
    monkeypatch.setattr(session, "build", build_slowly)
    with pytest.raises(UserError, match="was trained on meanwhile"):
        resume(run.path, "train.steps=14")
    assert run.steps()[-1] == 16


def test_the_first_speed_after_a_resume_counts_its_own_tokens() -> None:
    clock = Clock(tokens=1_000_000)
    seconds = clock.lap()
    assert clock.rate(1_000_500) == pytest.approx(500 / seconds)


def test_another_thread_count_or_precision_resumes_with_a_warning(
    resume: Resume, start: Start, told: Any
) -> None:
    run = start(train__keep_last=9).run
    try:
        resume(run.checkpoints / "step-00000008", "train.threads=2", "train.dtype=bf16")
    finally:
        torch.set_num_threads(1)
    for text in ("threads 1 then, 2 now", "dtype fp32 then, bf16 now"):
        assert f"{text}: training goes on, but not to the same bits" in told.warnings
    config = load_config(run.config)
    assert (config.train.threads, config.train.dtype) == (2, "bf16")
    assert run.status().state == "finished"


def test_a_change_to_fp16_begins_with_its_own_loss_scale(
    resume: Resume, start: Start, told: Any
) -> None:
    run = start(train__keep_last=9).run
    resume(run.checkpoints / "step-00000008", "train.dtype=fp16")
    assert checkpoint.load(run.path).optimizer["counters"]["loss_scale"] == 2.0**14


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_goes_on(
    resume: Resume,
    file: str,
    damage: Callable[[Path], None],
    start: Start,
    told: Any,
    state_of: Any,
) -> None:
    run = start(train__steps=8, log__sample_tokens=0).run
    assert run.steps() == [6, 8]
    straight = state_of(run.path)
    before = run.checkpoints / f"step-{run.steps()[-2]:08d}"
    damage(run.checkpoints / "step-00000008" / file)
    with pytest.raises(UserError) as error:
        resume(run.path, "train.steps=9")
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(str(run.checkpoints / "step-00000008" / file))
    command = shlex.split(text.split("the checkpoint before it is whole: ")[1])
    assert command == ["--resume", str(before)]
    resume(Path(command[1]))
    again = state_of(run.path)
    assert again["step"] == 8
    for name, tensor in straight["weights"].items():
        assert torch.equal(again["weights"][name], tensor)


@pytest.mark.parametrize("lattice", ["none", "reduced"])
def test_divergence_ends_the_run_and_says_what_to_do(
    lattice: str, resume: Resume, start: Start, told: Any
) -> None:
    on_it = {"model__embedding__kind": "reduced", "model__embedding__lattice": lattice}
    with pytest.raises(DivergedError, match=r"^4 steps in a row .* lower train.lr \(now 1e\+30\)"):
        start(
            train__lr=1e30,
            train__max_nonfinite=4,
            train__steps=30,
            train__eval_every=2,
            **(on_it if lattice != "none" else {}),
        )
    run = RunDirectory.open("run")
    status = run.status()
    assert status.state == "diverged"
    assert "4 steps in a row" in status.reason
    skips = [line["step"] for line in read_lines(run.metrics) if line["kind"] == "skip"]
    assert skips[-4:] == list(range(skips[-1] - 3, skips[-1] + 1))
    assert sum("the step was skipped" in text for text in told.warnings) == len(skips)
    # What was saved before loads, and can be gone on with at a lower rate.
    resume(run.checkpoints / "step-00000000", "train.lr=1e-3", "train.steps=6")
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
