"""Beginning and continuing a training run: what ``cllm train`` does.

``start`` prepares everything in a draft that becomes a run only once training can begin; ``resume``
goes on from a run's last checkpoint. Both end in a fit, the test score and the report.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from cllm.core.config import Config
from cllm.core.errors import SettingError, UsageError, UserError, value_errors_as
from cllm.core.settings import load_whole, merge, parse_setting, to_toml
from cllm.model.transformer import Transformer
from cllm.store import checkpoint as checkpoints
from cllm.store.draft import Draft
from cllm.store.metrics import MetricsLog, read_columns
from cllm.store.run import RunDirectory
from cllm.store.steps import discard_after, locate
from cllm.text.dataset import Dataset, load_prepared
from cllm.text.tokenizer import Tokenizer
from cllm.training.board import open_board
from cllm.training.build import build
from cllm.training.conclude import Outcome, conclude, first_facts
from cllm.training.distributed.entry import earlier_run, joined
from cllm.training.distributed.group import Group
from cllm.training.distributed.team import Team
from cllm.training.draw_sources import draws_of
from cllm.training.interrupt import Interrupt
from cllm.training.pace import measure_pace
from cllm.training.passes import advice
from cllm.training.progress import Progress
from cllm.training.report import write_report
from cllm.training.resolve import read_text, resolve
from cllm.training.snapshot import Standing, differences, restore
from cllm.training.start_tables import start_tables
from cllm.training.step import TrainStep
from cllm.training.tables import reduce_bases, table_facts
from cllm.training.trainer import DivergedError, Trainer

RESUMABLE = ("train.", "log.")
"""Settings that may change on resume begin so."""


def start(
    config: Config,
    progress: Progress,
    *,
    out: Path | str | None = None,
    from_run: Path | str | None = None,
    seconds: float | None = None,
    command: str = "",
) -> Outcome:
    """Train a new run.

    ``out``: its directory (default: a numbered one below ``runs/``). ``from_run``: a run whose weights
    and tokenizer are the start; ``config.model`` must be its shape. ``seconds``: a time budget that
    chooses ``train.steps``. Raises ``UserError`` for the user's mistakes; what failed before training
    began leaves nothing on the disk. Under torchrun the others serve, and what it began before it had to
    start its processes again goes on.
    """
    with joined() as group:
        if group is not None and (begun := earlier_run(group.launch, out)) is not None:
            progress.say(f"torchrun started its processes again: going on with {begun.path}")
            return _resume(begun.path, (), progress, group)
        return _start(config, progress, group, out, from_run, seconds, command)


def _start(
    config: Config,
    progress: Progress,
    group: Group | None,
    out: Path | str | None,
    from_run: Path | str | None,
    seconds: float | None,
    command: str,
) -> Outcome:
    began = time.monotonic()
    if seconds is not None and config.train.pipeline.mode == "delayed":
        raise UsageError(
            "--time measures the plain loop, and train.pipeline.mode = 'delayed' is another: say how many "
            "train.steps instead"
        )
    with value_errors_as(SettingError):
        config.train.check_asked()
        if from_run is None:
            config.model.embedding.check_asked()
    parent = RunDirectory.open(from_run) if from_run is not None else None
    with Draft(out, corpus=_corpus_name(config.data.paths)) as draft:
        reuse = Tokenizer.load(parent.tokenizer) if parent is not None else None
        dataset = read_text(config, draft.run.data, progress, reuse=reuse)
        dataset.tokenizer.save(draft.run.tokenizer)
        config = resolve(config, dataset, progress, seconds=seconds)
        model, step = build(config, draws_of(config, dataset, progress))
        rebased = dict[str, Any]()
        with ExitStack() as if_it_fails:
            if_it_fails.callback(step.close)  # workers, which measuring the pace has begun
            if from_run is not None:
                _adopt(Path(from_run), model, step)
            else:
                start_tables(config, dataset, model, progress)
                embedding = config.model.embedding
                if embedding.reduction != "none":
                    rebased = reduce_bases(model, embedding, dataset.train, progress.say)
                step.refresh()
            if group is not None:
                Team.assemble(group, config, step)
            if seconds is not None:
                left = seconds - (time.monotonic() - began)
                config = _fit_to_time(config, dataset, model, step, left, progress)
            if dropout := advice(config, len(dataset.train)):
                progress.warn(dropout)
            draft.run.write_config(to_toml(config))
            run = draft.commit()
            if_it_fails.pop_all()
    run.note(**first_facts(config, dataset, command, parent), rebased=rebased)
    if group is not None:
        run.note(job=group.launch.job)
    return train_run(config, run, load_prepared(run.data), model, step, Standing(), progress)


def resume(path: Path | str, settings: Sequence[str], progress: Progress) -> Outcome:
    """Go on with the run at ``path`` from its last checkpoint (or the checkpoint that ``path`` is).

    ``settings``: ``key=value`` changes of ``train.*`` and ``log.*``. Raises ``UserError`` if there is
    nothing to go on with.
    """
    with joined() as group:
        return _resume(path, settings, progress, group)


def _resume(
    path: Path | str, settings: Sequence[str], progress: Progress, group: Group | None
) -> Outcome:
    run = RunDirectory.open(path)
    config = load_whole(run.config)
    changes = dict(map(parse_setting, settings))
    for key in changes:
        if key.startswith("model.embedding."):
            raise UsageError(
                f"{key} cannot change on resume; `cllm reduce` makes a run with reduced tables of this "
                "one's, and for any other kind of table a run is trained anew"
            )
        if not key.startswith(RESUMABLE):
            raise UsageError(f"{key} cannot change on resume; only train.* and log.* can")
        if key == "train.optimizer" and changes[key] != config.train.optimizer:
            raise UsageError(
                f"{key} cannot change on resume: the state of {config.train.optimizer} is not its; "
                "use --from to start another run from these weights"
            )
    config = merge(config, changes)
    saved = checkpoints.load(Path(path))
    state = run.status().state
    # Killed while it was scored and reported on, a run has all its steps and still goes on.
    if state in ("finished", "stopped early") and not run.report.is_file():
        write_report(run.path)  # it was killed while it wrote this
        progress.say(f"the missing report was written: {run.report}")
    if saved.step >= config.train.steps and state in ("finished", "stopped early"):
        raise UsageError(
            f"{run.path} has all its {config.train.steps} steps; to train on, add "
            "--set train.steps=N with a larger N"
        )
    dataset = load_prepared(run.data)
    config = resolve(config, dataset, progress)
    if changes:
        progress.warn(
            f"{', '.join(changes)} changed on resume: an uninterrupted run would have differed"
        )
    model, step = build(config, draws_of(config, dataset, progress))
    standing = restore(saved, model, step)
    if group is not None:
        Team.assemble(group, config, step)
        run.note(job=group.launch.job)
    if state == "stopped early":
        standing.stale = 0  # who resumes it nevertheless wants to go on: patience begins anew
    for text in differences(saved, config.train):
        progress.warn(f"{text}: training goes on, but not to the same bits")
    progress.say(f"resuming {run.path} at step {standing.step}")
    newest = saved.step if locate(Path(path))[1] is None else None
    return train_run(config, run, dataset, model, step, standing, progress, newest)


def train_run(
    config: Config,
    run: RunDirectory,
    dataset: Dataset,
    model: Transformer,
    step: TrainStep,
    standing: Standing,
    progress: Progress,
    newest: int | None = None,
    fit: bool = True,
) -> Outcome:
    """Fit, score, sample and report, holding the run's lock.

    ``newest``: the step that must still be the run's newest once the lock is held. ``fit``: False to
    score the weights as they are.
    """
    resume_from = standing.step or None
    with ExitStack() as stack:
        stack.callback(step.close)
        session = stack.enter_context(run.training(from_step=standing.step, say=progress.say))
        if newest is not None and run.steps()[-1] != newest:
            raise UserError(f"{run.path} was trained on meanwhile; call --resume again")
        again = ("validation", "sample") if standing.unvalidated else ()
        log = MetricsLog(run.metrics, resume_from=resume_from, without=again)
        metrics = stack.enter_context(log)
        # Opened under the lock: its first event hides those of a later step, even another process's.
        enabled = config.log.tensorboard
        opened = open_board(run.tensorboard, enabled=enabled, resume_from=resume_from)
        board = stack.enter_context(opened)
        trainer = Trainer(
            config=config,
            run=run,
            dataset=dataset,
            model=model,
            step=step,
            standing=standing,
            metrics=metrics,
            board=board,
            progress=progress,
        )
        stack.callback(trainer.close)
        run.write_config(to_toml(config))  # here, where nothing can refuse it any more
        discard_after(run.path, standing.step)
        if standing.step == 0:
            trainer.save(best=False, wait=True)  # so that a kill at any moment leaves something
        try:
            with Interrupt(run.path) as interrupt:
                state = trainer.fit(interrupt) if fit else "finished"
            outcome = conclude(trainer, state)
        except DivergedError as error:
            trainer.close()  # what it still writes down changes the status, too
            session.end("diverged", str(error), warnings=progress.warnings)
            raise
        facts = _last_facts(run, standing, outcome)
        facts["table"] = table_facts(model, step, config, dataset.train)
        if state == "finished":
            session.end("finished", warnings=progress.warnings, **facts)
        else:
            session.end("stopped early", warnings=progress.warnings, **facts)
    write_report(run.path)
    return outcome


def _last_facts(run: RunDirectory, standing: Standing, outcome: Outcome) -> dict[str, Any]:
    rates = read_columns(run.metrics, "train").get("time.tokens_per_second", [])
    return {
        "step": standing.step,
        "tokens": standing.tokens,
        "train_seconds": round(standing.train_seconds, 3),
        # The median: compilation falls into the first reading, and a busy machine into some.
        "tokens_per_second": round(median(rates[1:] or rates), 1) if rates else None,
        "validation_bpb": outcome.validation.bpb if outcome.validation else None,
        "test_bpb": outcome.test.bpb if outcome.test else None,
    }


def _adopt(parent: Path, model: Transformer, step: TrainStep) -> None:
    """Start from another run's best weights, or from those of the checkpoint that ``parent`` is."""
    weights = checkpoints.load_weights(parent)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != wanted:
        raise UserError(
            f"{parent} has another shape of model; leave out the model.* settings (`cllm reduce` makes a "
            "run with another kind of table)"
        )
    model.load_state_dict(weights)
    step.refresh()


def _fit_to_time(
    config: Config,
    dataset: Dataset,
    model: Transformer,
    step: TrainStep,
    seconds: float,
    progress: Progress,
) -> Config:
    """``config`` with the steps that the ``seconds`` left allow; the schedule follows from them."""
    with progress.stage("measuring the pace (compiling first)"):
        pace = measure_pace(config, dataset, model, step)
    steps = pace.steps_in(seconds - pace.measuring, config.train.eval_every)
    progress.say(
        f"{steps:,} steps of {1000 * pace.step:.1f} ms fit into the time left "
        f"({max(seconds - pace.measuring, 0):,.0f} s)"
    )
    if steps * pace.step > seconds - pace.measuring:
        progress.warn("the time is too short for more than a token training; it will be exceeded")
    return merge(config, {"train.steps": steps})


def _corpus_name(paths: Sequence[str]) -> str:
    """A word for the run's directory."""
    if not paths:
        return "python-docs"
    return Path(paths[0].rstrip("/\\").split(":", 1)[-1]).name.split(".")[0] or "text"
