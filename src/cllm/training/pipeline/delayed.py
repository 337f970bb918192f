"""Three stages on three threads: the forward of batch N, the backward of N − 1, the optimizer of N − 2.

This is training with a delay: step t applies the gradient of batch t on the weights of ``delay`` steps
ago (with w₋₁ = w₋₂ = w₀),

    w_{t+1} = w_t − η_t · u(g_t(w_{t−delay})),

moments, clipping and skipped steps in the order of the batches. The backward of a batch reads the very
weights that its forward has read (weight stashing; PipeDream, Narayanan et al. 2019), from a ring of
``delay`` + 1 copies. With a delay of 0 the stages take turns, and the recurrence is the plain loop.

A *segment* is what runs from one drain to the next; each begins as if it were the first.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cllm.training.feed import target_count
from cllm.training.figures import StepResult
from cllm.training.gradient import Micro
from cllm.training.pipeline.halves import Halves, Held
from cllm.training.pipeline.line import Line, Over, Pause, Queue, Ring
from cllm.training.step import TrainStep

DELAY = 2
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass
class _Job:
    """A batch on its way. ``number`` within the segment; ``seed`` of its dropout; ``loss`` summed."""

    number: int
    batches: Batches
    lr: float
    seed: int | None
    targets: int
    held: list[Held] = field(default_factory=list)
    loss: float = 0.0
    grad: Tensor | None = None


class Delayed:
    """Steps of ``step`` (whose model, arena, optimizer and counters they are) with a delay.

    ``submit`` gives a batch in, ``result`` takes the oldest step's result out; at most ``delay`` + 1
    batches are between them. With none there the pipeline is drained, and the weights may be read, changed
    or saved after ``settle``. Threads begin with the first batch and end with ``close``.
    """

    def __init__(self, step: TrainStep, *, delay: int = DELAY, pause: Pause | None = None) -> None:
        assert step.crew is None
        assert step.lazy is None
        self.step, self.delay = step, delay
        arena, self.compiled = step.arena, step.compiled
        self.halves = Halves(step.gradients, compiled=self.compiled)
        self.line = Line(pause)
        self.ring = Ring(self.line, [torch.empty_like(arena.compute) for _ in range(delay + 1)])
        self._parts = [arena.parts(buffer) for buffer in self.ring.buffers]
        self._asked = Queue[_Job](self.line, "batch", delay + 1)
        self._forwarded = Queue[_Job](self.line, "activations", 1)
        self._summed = Queue[_Job](self.line, "gradient", 1)
        self._free = Queue[Tensor](self.line, "free gradient", 2)
        self._results = Queue[StepResult](self.line, "result", delay + 1)
        for grad in (arena.grad, torch.empty_like(arena.grad)):
            self._free.put(grad)
        self._threads: list[threading.Thread] = []
        self._submitted = self._taken = 0

    @property
    def in_flight(self) -> int:
        """Batches whose results were not taken yet."""
        return self._submitted - self._taken

    def submit(self, batches: Batches, lr: float, seed: int | None = None) -> None:
        """Give the micro-batches of the next step in, and the seed of its dropout, if it has any.

        The first batch of all passes through the stages alone where they are compiled, which each stage is
        by its own thread: torch's compiler keeps state that threads would share. Raises what a stage has
        raised.
        """
        assert self.in_flight <= self.delay
        alone = self.compiled and not self._threads
        if not self._threads:
            self._start()
        if not self.in_flight:
            self._begin_segment()
        job = _Job(self._submitted, batches, lr, seed, max(target_count(batches), 1))
        with self._errors():
            self._asked.put(job)
            if alone:
                self._results.wait()
        self._submitted += 1

    def result(self) -> StepResult:
        """The oldest step's result, once it is there. Raises what a stage has raised."""
        assert self.in_flight
        with self._errors():
            result = self._results.get()
        self._taken += 1
        self.step.count(result.applied)
        return result

    def settle(self) -> None:
        """Let the model be read: the arithmetic's copy of the weights is theirs again."""
        assert not self.in_flight
        self.step.arena.refresh()
        for table in self.step.model.tables.values():
            table.after_step()

    def close(self, patience: float | None = None) -> bool:
        """End the threads; what is on its way is dropped.

        False where a stage, as one that compiles, has not ended within ``patience`` seconds, if that is
        given: it ends with the process.
        """
        self.line.end()
        end = None if patience is None else time.monotonic() + patience
        for thread in self._threads:
            thread.join(None if end is None else max(end - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Over:
            assert self.line.error is not None, "the pipeline was closed"
            raise self.line.error from None

    def _begin_segment(self) -> None:
        self._submitted = self._taken = 0
        self.ring.restart()
        self.ring.buffers[0].copy_(self.step.arena.weights)
        self._applied = int(self.step.counters["applied"])
        self.ring.publish()

    def _start(self) -> None:
        stages = {"forward": self._forward, "backward": self._backward, "optimizer": self._optimize}
        for name, stage in stages.items():
            arguments = (stage, torch.get_num_threads())
            thread = threading.Thread(
                target=self._run, args=arguments, name=f"pipeline {name}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _run(self, stage: Callable[[], None], threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            while True:
                stage()
        except Over:
            return
        except BaseException as error:
            self.line.end(error)

    def _version(self, job: _Job) -> int:
        """The weights that a batch is computed on."""
        return max(job.number - self.delay, 0)

    def _forward(self) -> None:
        job = self._asked.get()
        weights = self.ring.take(self._version(job))
        dense = weights[: self.step.gradients.layout.size]
        if job.seed is not None:
            torch.manual_seed(job.seed)
        scale = weights.new_full((), 1.0 / job.targets, dtype=self.step.arena.grad.dtype)
        job.held = [self.halves.forward(dense, Micro(*pair), scale) for pair in job.batches]
        self._forwarded.put(job)

    def _backward(self) -> None:
        job = self._forwarded.get()
        job.grad = self._free.get()
        for number, held in enumerate(job.held):
            self.halves.backward(held, job.grad, first=number == 0)
            job.loss += float(held.loss)
        job.held = []
        self.ring.give_back(self._version(job))
        self._summed.put(job)

    def _optimize(self) -> None:
        job, update = self._summed.get(), self.step.update
        assert job.grad is not None
        norm = update.norm(job.grad)
        place = self.ring.place_of_next()
        applied = math.isfinite(norm) and math.isfinite(job.loss)
        if applied:
            self._applied += 1
            update.apply(job.grad, norm, 1.0, job.lr, self._applied, self._parts[place])
        else:
            self.ring.buffers[place].copy_(self.step.arena.weights)
        self.ring.publish()
        self._free.put(job.grad)
        self._results.put(StepResult(job.loss / job.targets, norm, applied))
