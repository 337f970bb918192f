"""What a person sees while training runs: a live bar on a terminal, plain lines elsewhere, or nothing.

All three know ``say`` (a decision, in one line), ``warn``, stages such as "preparing corpus", and the
readings of the training loop. Warnings are kept in ``warnings`` for the report, whatever is shown.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol

from cllm.core.memory import peak_rss

WORTH_TELLING = 1.0
"""Seconds from which on the duration of a stage is told."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The state of training after a step, as far as it is known."""

    step: int
    loss: float | None = None
    """Training loss in nats per token."""
    bpb: float | None = None
    """Training loss in bits per byte."""
    tokens_per_second: float | None = None
    is_estimate: bool = False
    """Whether the loss is an estimate by sampled softmax."""


class Progress(Protocol):
    """Where training reports to."""

    warnings: list[str]
    """The warnings so far."""

    def say(self, text: str) -> None:
        """Tell a decision or a result in one line."""

    def warn(self, text: str) -> None:
        """Warn in one line."""

    def stage(
        self, name: str, total: float | None = None
    ) -> AbstractContextManager[Callable[[float], None]]:
        """A piece of work of ``total`` units (unknown: ``None``); yields a function to add units done."""

    def training(
        self, steps: int, first: int = 0
    ) -> AbstractContextManager[Callable[[Reading], None]]:
        """The training loop up to step ``steps``, from ``first``; yields a function to hand readings."""


class Clock:
    """Time left, from the pace of the last readings (compilation at the start does not count long)."""

    def __init__(self, steps: int, now: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._now = steps, now
        self._seen: deque[tuple[float, int]] = deque(maxlen=30)

    def seconds_left(self, step: int) -> float | None:
        """Seconds until the last step, or ``None`` before there is a pace."""
        self._seen.append((self._now(), step))
        (since, first), (now, last) = self._seen[0], self._seen[-1]
        return (now - since) / (last - first) * (self._steps - step) if last > first else None


class Silent:
    """Shows nothing (``--quiet``)."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        yield lambda done: None

    @contextmanager
    def training(self, steps: int, first: int = 0) -> Iterator[Callable[[Reading], None]]:
        yield lambda reading: None


class Lines:
    """Plain lines, for logs and pipes; ``every`` seconds at most one of a running stage or training."""

    def __init__(
        self,
        stream: IO[str] | None = None,
        *,
        every: float = 5.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.warnings: list[str] = []
        self._stream, self._every, self._now = stream, every, now

    def say(self, text: str) -> None:
        print(text, file=self._stream or sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.say(f"warning: {text}")

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        begin = shown = self._now()
        done = 0.0
        self.say(f"{name} …")

        def advance(units: float) -> None:
            nonlocal done, shown
            done += units
            if total and self._now() - shown >= self._every:
                shown = self._now()
                self.say(f"{name} … {done / total:.0%}")

        yield advance
        if self._now() - begin >= WORTH_TELLING:
            self.say(f"{name}: {duration(self._now() - begin)}")

    @contextmanager
    def training(self, steps: int, first: int = 0) -> Iterator[Callable[[Reading], None]]:
        clock = Clock(steps, self._now)
        shown = -float("inf")

        def show(reading: Reading) -> None:
            nonlocal shown
            left = clock.seconds_left(reading.step)
            if reading.step >= steps or self._now() - shown >= self._every:
                shown = self._now()
                self.say(f"step {reading.step}/{steps}  " + "  ".join(figures(reading, left)))

        yield show


class Live:
    """A bar that stays in place, on a terminal or in a notebook; messages scroll above it.

    ``rich`` catches what anything else prints meanwhile and puts it above the bar as well.
    """

    def __init__(self, console: Any) -> None:
        """``console``: a ``rich.console.Console``."""
        self.warnings: list[str] = []
        self._console = console
        self._bar: Any = None

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        from rich.text import Text  # a style given to print would colour the bar as well

        self._console.print(Text(f"warning: {text}", style="yellow"))

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        begin = time.monotonic()
        with self._task(name, total, completed=0) as (bar, task):
            yield lambda units: bar.advance(task, units)
        if time.monotonic() - begin >= WORTH_TELLING:
            self.say(f"{name}: {duration(time.monotonic() - begin)}")

    @contextmanager
    def training(self, steps: int, first: int = 0) -> Iterator[Callable[[Reading], None]]:
        clock = Clock(steps)
        with self._task("training", steps, first) as (bar, task):

            def show(reading: Reading) -> None:
                texts = figures(reading, clock.seconds_left(reading.step))
                bar.update(
                    task,
                    completed=reading.step,
                    count=f"{reading.step}/{steps}",
                    figures="  ".join(texts),
                )

            yield show

    @contextmanager
    def _task(self, name: str, total: float | None, completed: float) -> Iterator[tuple[Any, Any]]:
        """A line of the bar. A stage within training shares its bar: a console has but one."""
        outermost = self._bar is None
        if outermost:
            self._bar = _rich_bar(self._console)
            self._bar.start()
        task = self._bar.add_task(name, total=total, completed=completed, count="", figures="")
        try:
            yield self._bar, task
        finally:
            if outermost:
                self._bar.stop()
                self._bar = None
            else:
                self._bar.remove_task(task)


def _rich_bar(console: Any) -> Any:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    # With the figures this must stay within 80 columns, or rich cuts the figures off.
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[figures]}"),
        console=console,
        refresh_per_second=4,
    )


def open_progress(*, quiet: bool = False, stream: IO[str] | None = None) -> Progress:
    """The progress display that fits ``stream`` (default: standard error)."""
    if quiet:
        return Silent()
    from rich.console import Console

    console = Console(file=stream, stderr=stream is None)
    if console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal):
        return Live(console)
    return Lines(stream)


def figures(reading: Reading, seconds_left: float | None) -> list[str]:
    """The figures of ``reading`` as short texts, those that are known."""
    texts = []
    if reading.loss is not None:
        texts.append(f"{'estimated ' if reading.is_estimate else ''}loss {reading.loss:.3f}")
    if reading.bpb is not None and not reading.is_estimate:  # the line has room for one of both
        texts.append(f"{reading.bpb:.3f} bpb")
    if reading.tokens_per_second is not None:
        texts.append(f"{amount(reading.tokens_per_second)} tok/s")
    if seconds_left is not None:
        texts.append(f"{duration(seconds_left)} left")
    return [*texts, f"{peak_rss() / 2**30:.2f} GiB"]


def duration(seconds: float) -> str:
    """``4.2 s``, ``3:05`` or ``2:03:05``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def amount(number: float) -> str:
    """``950``, ``30.5k`` or ``1.24M``."""
    if number < 999.5:
        return f"{number:.0f}"
    return f"{number / 1000:.1f}k" if number < 999_950 else f"{number / 1e6:.2f}M"


def as_one(advance: Callable[[float], None]) -> Callable[[str, float], None]:
    """Turn the shares of preparation's stages into one count of a hundred."""
    weights = {
        "reading": 25.0,
        "duplicates": 10.0,
        "tokenizer": 25.0,
        "encoding train": 36.0,
        "encoding validation": 2.0,
        "encoding test": 2.0,
    }
    shown: dict[str, float] = {}

    def show(stage: str, share: float) -> None:
        part = weights.get(stage, 0.0) * min(max(share, 0.0), 1.0)
        if part > shown.get(stage, 0.0):
            advance(part - shown.get(stage, 0.0))
            shown[stage] = part

    return show
