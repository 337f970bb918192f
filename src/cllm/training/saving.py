"""A run's checkpoints in training: a copy of where it stands, written beside the steps that follow."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from cllm.core.config import Config
from cllm.store import checkpoint as checkpoints
from cllm.store.metrics import MetricsLog
from cllm.store.run import RunDirectory
from cllm.training.background import Background
from cllm.training.board import Board
from cllm.training.snapshot import Standing, environment, optimizer_of, weights_of
from cllm.training.step import TrainStep


@dataclass(kw_only=True)
class Saver:
    """Writes checkpoints of one run, and the log's lines before them, through ``background``.

    One checkpoint at a time is being written: the next waits for it, and raises what it has raised.
    """

    config: Config
    run: RunDirectory
    step: TrainStep
    metrics: MetricsLog
    board: Board
    background: Background

    def save(self, standing: Standing, *, best: bool) -> None:
        """Have the metrics written down, then the checkpoint of the present step.

        Processes that write together (see ``Team.save``) do so at once.
        """
        self.background.wait()
        step, train, team = self.step, self.config.train, self.step.team
        together = team is not None and team.writes_together
        optimizer = optimizer_of(step, moments=not together)
        with nullcontext() if together else step.settled():
            weights = {} if together else weights_of(step.model)
            if self.background.threaded and not together:
                weights, optimizer = _copied(weights), _copied(optimizer)
            # Processes that write together talk to each other from their main threads.
            write = self._write if together else partial(self.background.hand_over, self._write)
            write(
                standing.step,
                weights=weights,
                optimizer=optimizer,
                state={"standing": standing.to_json(), "environment": environment(train)},
                seconds=standing.train_seconds,
                skipping=bool(step.counters["in_row"]),
                best=best,
                shards=team.save if team is not None and together else None,
            )

    def save_once(self, standing: Standing) -> None:
        """Save the present step unless it was saved already, and wait until it is written."""
        self.background.wait()
        if standing.step not in self.run.steps():
            self.save(standing, best=False)
            self.background.wait()

    def _write(self, step: int, *, seconds: float, skipping: bool, **contents: Any) -> None:
        self.metrics.sync()
        self.board.flush()
        # All are kept while steps are being skipped: the newest may hold the weights that cannot be gone on
        # with, and must not push out the last ones that can.
        kept = len(self.run.steps()) + 1 if skipping else self.config.train.keep_last
        checkpoints.save(self.run.path, step, keep_last=kept, **contents)
        self.run.note(step=step, train_seconds=round(seconds, 3))


def _copied(value: Any) -> Any:
    """A tree of dicts with copies of its tensors, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value
