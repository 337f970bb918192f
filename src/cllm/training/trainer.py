"""The training loop: steps, validations, checkpoints and what is logged of them.

It composes parts and holds no arithmetic of its own. The order of batches is a function of seed and
step, and random numbers (dropout) are drawn from a seed of the step, so that a resumed run needs no
replay and gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch

from cllm.core.config import Config, TrainConfig
from cllm.core.errors import UserError
from cllm.model.transformer import Transformer
from cllm.store.metrics import MetricsLog
from cllm.store.run import RunDirectory
from cllm.text.batches import BatchSource
from cllm.text.dataset import Dataset
from cllm.training.background import Background
from cllm.training.board import Board
from cllm.training.clock import Clock
from cllm.training.evaluate import Evaluation, evaluate, norm_mode_gap
from cllm.training.feed import Feed, target_count
from cllm.training.figures import StepResult
from cllm.training.interrupt import GivenUpError, Interrupt
from cllm.training.pipeline.ahead import Ahead
from cllm.training.pipeline.delayed import DELAY
from cllm.training.progress import Progress, Reading
from cllm.training.samples import sample_texts
from cllm.training.saving import Saver
from cllm.training.schedule import learning_rate, similarity_weight
from cllm.training.snapshot import Standing
from cllm.training.step import TrainStep
from cllm.training.stop import save_and_raise

RISING_VALIDATIONS = 3
"""Validations in a row that rise while training falls, after which over-fitting is warned of."""

PATIENCE, STAGES_PATIENCE = 1.0, 4.0
"""Seconds that the stages of a pipeline get to end: where what they do is given up, and else."""


class DivergedError(UserError):
    """Training led to numbers that are not finite."""

    def __init__(self, what: str, train: TrainConfig) -> None:
        super().__init__(
            f"{what}; lower train.lr (now {train.lr:g}), raise train.warmup or lower train.clip"
        )


@dataclass(kw_only=True)
class Trainer:
    """One run in training, from ``standing`` to ``config.train.steps``."""

    config: Config
    run: RunDirectory
    dataset: Dataset
    model: Transformer
    step: TrainStep
    standing: Standing
    metrics: MetricsLog
    board: Board
    progress: Progress

    def __post_init__(self) -> None:
        train, model = self.config.train, self.config.model
        self.batches = BatchSource(self.dataset.train, model.context, train.batch_size, train.seed)
        split = self.dataset.report.splits["train"]
        self.bits_per_nat = split.scored_tokens / max(split.scored_bytes, 1) / math.log(2)
        self.warned = False
        delayed = train.pipeline.mode == "delayed"
        held = DELAY if delayed else 0
        self.feed = Feed(self.batches, train, held=held, ahead=train.overlap)
        self.ahead = Ahead(self.step, train, self.feed, self._seed) if delayed else None
        self._interrupt, self.background = Interrupt(), Background(threaded=train.overlap)
        self.saver = Saver(
            config=self.config,
            run=self.run,
            step=self.step,
            metrics=self.metrics,
            board=self.board,
            background=self.background,
        )

    def fit(self, interrupt: Interrupt) -> str:
        """Train to the end; returns ``"finished"``, or ``"stopped early"``.

        A signal held by ``interrupt`` saves a checkpoint after the step at hand and raises what it
        holds. A step or validation that takes too long is given up; what was trained before it is saved
        all the same, unless an update was being made. Raises ``DivergedError`` after ``max_nonfinite``
        skipped steps in a row.
        """
        train, standing = self.config.train, self.standing
        self._interrupt, self._offset = interrupt, self.step.number - standing.step
        self.step.heed(interrupt)
        self.model.train()
        with self.progress.training(train.steps, standing.step) as show, self._pipeline():
            if 0 < train.patience <= standing.stale:
                return "stopped early"  # and was killed before it was concluded
            try:
                return self._steps(interrupt, show)
            except GivenUpError:
                if interrupt.pending:
                    self._stop(interrupt, "; the step that followed was given up", PATIENCE)
                raise

    def _steps(self, interrupt: Interrupt, show: Callable[[Reading], None]) -> str:
        train, standing = self.config.train, self.standing
        clock = Clock(standing.tokens)
        while standing.step < train.steps or standing.unvalidated:
            again = standing.unvalidated  # the step is made, and its validation was given up
            if not again:
                result, targets = self._one_step()
                with interrupt.whole():
                    standing.tokens += targets
                    interrupt.last_step = clock.lap()
                    standing.train_seconds += interrupt.last_step
                    self._after_step(result, clock, show)
            done = standing.step >= train.steps
            improved, enough = False, False
            if again or done or standing.step % train.eval_every == 0:
                improved, enough = self._validate()
            wanted = done or enough or improved or again
            if wanted or standing.step % train.checkpoint_every == 0:
                with interrupt.saving():
                    self.save(best=improved, wait=done or enough)
            if self.ahead is not None:
                with interrupt.whole():
                    self.ahead.keep(standing)
            if interrupt.pending:
                self._stop(interrupt, "", STAGES_PATIENCE)
            if enough:
                return "stopped early"
            clock.start_lap()
        return "finished"

    def _stop(self, interrupt: Interrupt, besides: str, patience: float) -> NoReturn:
        """See ``save_and_raise``, which is told what belongs together."""
        made = self.step.number - self._offset
        rewind = partial(self.ahead.rewind, patience) if self.ahead is not None else None
        save_and_raise(self.saver, self.standing, interrupt, besides, made=made, rewind=rewind)

    def _one_step(self) -> tuple[StepResult, int]:
        """Make the next step: its result and number of targets."""
        train, at = self.config.train, self.standing.step
        if self.ahead is not None:
            return self.ahead.step(at)
        seed = self._seed(at)
        if seed is not None:
            torch.manual_seed(seed)
        batches = self.feed(at)
        result = self.step(batches, learning_rate(train, at), similarity_weight(train, at))
        return result, target_count(batches)

    def _seed(self, at: int) -> int | None:
        """Of the dropout of step ``at``, if there is any."""
        model = self.config.model
        if not model.embedding_dropout + model.attention_dropout + model.residual_dropout:
            return None
        return (self.config.train.seed * 1_000_003 + at) % 2**63

    @contextmanager
    def _pipeline(self) -> Iterator[None]:
        """Within it the pipeline may run, if there is one."""
        if self.ahead is not None:
            self.ahead.keep(self.standing)
        try:
            yield
        finally:
            if self.ahead is not None:
                self.ahead.close(PATIENCE)

    def _after_step(
        self, result: StepResult, clock: Clock, show: Callable[[Reading], None]
    ) -> None:
        standing, train = self.standing, self.config.train
        rate = learning_rate(train, standing.step)
        standing.step += 1
        if not result.applied:
            self._skipped(result)
        else:
            standing.losses.append(result.loss)
        if standing.step % self.config.log.every and standing.step != train.steps:
            return
        speed = clock.rate(standing.tokens)
        loss = sum(standing.losses) / len(standing.losses) if standing.losses else float("nan")
        standing.losses.clear()
        label = "estimated_" if self.step.draws.estimates else ""
        bpb = loss * self.bits_per_nat
        values = {f"{label}loss": loss, f"{label}bpb": bpb, "grad_norm": result.grad_norm}
        values |= {"lr": rate}
        if result.similarity is not None:
            values["similarity_loss"] = result.similarity
            values["similarity_weight"] = similarity_weight(train, standing.step - 1)
        if self.step.scaling:
            values["loss_scale"] = float(self.step.counters["loss_scale"])
        standing.train_loss = loss
        self._log(
            standing.step,
            "train",
            **values,
            tokens=standing.tokens,
            epoch=self.batches.epoch(standing.step * train.accumulate),
            time={"tokens_per_second": speed, "seconds": standing.train_seconds},
        )
        scalars = {f"train/{name}": value for name, value in values.items()}
        self.board.scalars(standing.step, scalars | {"speed/tokens_per_second": speed})
        show(
            Reading(
                step=standing.step,
                loss=loss,
                bpb=bpb,
                tokens_per_second=speed,
                is_estimate=self.step.draws.estimates,
            )
        )

    def _log(self, step: int, kind: str, **values: Any) -> None:
        """A line of the metrics."""
        self.background.hand_over(self.metrics.write, step, kind, **values)

    def _skipped(self, result: StepResult) -> None:
        standing, limit = self.standing, self.config.train.max_nonfinite
        what = "loss" if not math.isfinite(result.loss) else "gradient"
        reason = f"{what} not finite"
        scaled = ""
        if self.step.scaling:
            scaled = f" (fp16 loss scale now {float(self.step.counters['loss_scale']):g})"
        self._log(standing.step, "skip", reason=reason)
        self.progress.warn(f"step {standing.step}: {reason}; the step was skipped{scaled}")
        if int(self.step.counters["in_row"]) >= limit:
            said = f"{limit} steps in a row had a {what} that was not finite"
            raise DivergedError(said, self.config.train)

    def _validate(self) -> tuple[bool, bool]:
        """Validate at the present step: (a new best, enough of early stopping)."""
        standing, train = self.standing, self.config.train
        tokens = self.dataset.validation
        if tokens is None:
            return False, False
        standing.unvalidated = True
        result = self.evaluate("validation")
        extra, texts = {}, list[str]()
        with self.step.settled():
            if self.config.model.norm == "batchnorm":
                extra["mode_gap"] = norm_mode_gap(
                    self.model,
                    self.step.evaluate_eagerly,
                    tokens,
                    context=self.config.model.context,
                    batch_size=train.batch_size,
                    device=train.device,
                )
            if self.config.log.sample_tokens:
                tokens_of = self.config.log.sample_tokens
                texts = sample_texts(self.model, self.dataset.tokenizer, count=1, tokens=tokens_of)
            if self.config.log.histograms and self.config.log.tensorboard:
                self.board.histograms(standing.step, dict(self.model.named_parameters()))
        with self._interrupt.whole():
            return self._take_in(result, extra, texts)

    def _take_in(
        self, result: Evaluation, extra: dict[str, float], texts: Sequence[str]
    ) -> tuple[bool, bool]:
        """Log a validation and remember what is to be known of it: (a new best, enough)."""
        standing, train = self.standing, self.config.train
        self._log(standing.step, "validation", **result.to_json(), **extra)
        self._log_validation(result, extra, texts)
        standing.unvalidated = False
        improved = result.bpb < standing.best_bpb
        if improved:
            standing.best_bpb, standing.best_step = result.bpb, standing.step
        if result.bpb < standing.patience_bpb - train.min_improvement:
            standing.patience_bpb, standing.stale = result.bpb, 0
        else:
            standing.stale += 1
        self._warn_if_rising(result.bpb)
        enough = train.patience > 0 and standing.stale >= train.patience
        if enough:
            self.progress.say(
                f"stopped early: {standing.stale} validations without an improvement of "
                f"{train.min_improvement:g} bits per byte"
            )
        return improved, enough

    def evaluate(self, split: str) -> Evaluation:
        """Score a split with the present weights, in eval mode."""
        tokens = getattr(self.dataset, split)
        windows = -(-(len(tokens) - 1) // self.config.model.context)
        self.model.eval()
        stage = self.progress.stage(f"evaluating on {split}", windows)
        with self.step.settled(), stage as advance:
            result = evaluate(
                self.step.evaluate,
                tokens,
                context=self.config.model.context,
                batch_size=self.step.rows_at_once,
                device=self.config.train.device,
                advance=self._interrupt.giving_up(advance),
            )
        self.model.train()
        return result

    def _log_validation(
        self, result: Evaluation, extra: dict[str, float], texts: Sequence[str]
    ) -> None:
        at = self.standing.step
        gap = f", {extra['mode_gap']:+.4f} nats from train to eval mode" if extra else ""
        self.progress.say(
            f"step {at}: validation {result.bpb:.4f} bits per byte (loss {result.loss:.4f}, "
            f"perplexity {result.perplexity:.1f}{gap})"
        )
        scalars = {"bpb": result.bpb, "loss": result.loss, "perplexity": result.perplexity} | extra
        self.board.scalars(at, {f"validation/{name}": value for name, value in scalars.items()})
        for text in texts:
            self._log(at, "sample", prompt="", text=text)
            self.board.text(at, "sample", text)

    def _warn_if_rising(self, bpb: float) -> None:
        """Say plainly when validation rises while training falls."""
        standing = self.standing
        below = standing.train_loss * self.bits_per_nat < bpb
        standing.rising = standing.rising + 1 if bpb > standing.last_bpb and below else 0
        standing.last_bpb = bpb
        if standing.rising >= RISING_VALIDATIONS and not self.warned:
            self.warned = True
            self.progress.warn(
                f"validation has risen {standing.rising} times in a row while training stays below it: the "
                "model is learning its text by heart; stop earlier (train.patience), use a smaller "
                "model, dropout, or more text"
            )

    def save(self, *, best: bool, wait: bool = False) -> None:
        """Have the checkpoint of the present step written; ``wait`` until it is."""
        self.saver.save(self.standing, best=best)
        if wait:
            self.background.wait()

    def close(self) -> None:
        """End the threads beside the steps, once they have done what they were handed."""
        self.feed.close()
        self.background.close()
