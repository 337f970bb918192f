"""The plots of a run, as PNG files, from its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from cllm.core.atomic import clear_errors, new_file
from cllm.store.metrics import Columns, read_columns

# Okabe and Ito's palette (2008): told apart in every common form of colour blindness.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"


def draw_plots(metrics: Path, folder: Path, *, clip: float = 0.0) -> list[Path]:
    """Draw what ``metrics`` (a ``metrics.jsonl``) holds into ``folder``; returns the files written.

    ``loss.png`` (nats per token), ``bits_per_byte.png``, ``learning_rate.png``, ``gradient_norm.png`` (with
    the threshold ``clip``, if not 0) and ``speed.png`` (tokens/s). What was not measured is not drawn.
    """
    train, validation = read_columns(metrics, "train"), read_columns(metrics, "validation")
    training = _label_estimates(train)
    figures = {
        "loss": _quality(train, validation, "loss", "loss (nats per token)", training),
        "bits_per_byte": _quality(train, validation, "bpb", "bits per byte", training),
        "learning_rate": _learning_rate(train),
        "gradient_norm": _gradient_norm(train, clip),
        "speed": _speed(train),
    }
    with clear_errors(folder):
        folder.mkdir(exist_ok=True)
    written = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # of an earlier report, whose metrics were cut since
            continue
        with new_file(path) as file:
            figure.savefig(file, format="png")
        written.append(path)
    return written


def _label_estimates(train: Columns) -> str:
    """Put estimated losses among the exact ones, if there are any; returns the name of the curve."""
    estimated = [name for name in ("loss", "bpb") if f"estimated_{name}" in train]
    for name in estimated:
        guesses = train[f"estimated_{name}"]
        # A run whose loss was changed on resume has some of both.
        exact = train.get(name, [math.nan] * len(guesses))
        pairs = zip(guesses, exact, strict=True)
        train[name] = [guess if math.isfinite(guess) else value for guess, value in pairs]
    return "training (estimate)" if estimated else "training"


def smooth(values: Sequence[float], half_life: float) -> list[float]:
    """Exponential moving average, unbiased at its start; NaN is left out and carries the average on.

    ``half_life``: the number of values after which a value's weight has halved.
    """
    decay = 0.5 ** (1 / half_life)
    total = weight = 0.0
    averages = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        averages.append(total / weight if weight else math.nan)
    return averages


def _quality(
    train: Columns, validation: Columns, name: str, label: str, training: str
) -> Any | None:
    if not _measured(train, name) and not _measured(validation, name):
        return None
    figure, axes = _axes(label)
    if _measured(train, name):
        steps, values = train["step"], train[name]
        axes.plot(
            steps,
            values,
            color=BLUE,
            alpha=0.4,
            linewidth=0.8,
            marker=_marker(values),
            label=training,
        )
        averages = smooth(values, max(1.0, len(values) / 100))
        axes.plot(steps, averages, color=BLUE, linewidth=1.8, label=f"{training}, smoothed")
    if _measured(validation, name):
        steps, values = validation["step"], validation[name]
        axes.plot(steps, values, color=ORANGE, linewidth=1.5, marker="o", ms=4, label="validation")
        best = min(range(len(values)), key=lambda index: _or_infinite(values[index]))
        axes.plot(
            steps[best],
            values[best],
            color=ORANGE,
            marker="*",
            markersize=15,
            markeredgecolor="white",
            linestyle="none",
            label=f"best validation: {values[best]:.3f} at step {steps[best]}",
        )
    axes.legend(frameon=False)
    return figure


def _learning_rate(train: Columns) -> Any | None:
    if not _measured(train, "lr"):
        return None
    figure, axes = _axes("learning rate")
    axes.plot(train["step"], train["lr"], color=GREEN, linewidth=1.8, marker=_marker(train["lr"]))
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    return figure


def _gradient_norm(train: Columns, clip: float) -> Any | None:
    if not _measured(train, "grad_norm"):
        return None
    figure, axes = _axes("gradient norm before clipping (L2)")
    values = train["grad_norm"]
    axes.plot(train["step"], values, color=BLUE, linewidth=1.0, marker=_marker(values))
    if any(value > 0 for value in values):
        axes.set_yscale("log")
        from matplotlib.ticker import LogFormatter  # 0.3 where the default writes 3·10⁻¹

        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.5)))
    if clip:
        axes.axhline(
            clip, color=ORANGE, linestyle="--", linewidth=1.2, label=f"clipped above {clip:g}"
        )
        axes.legend(frameon=False)
    return figure


def _speed(train: Columns) -> Any | None:
    name = "time.tokens_per_second"
    if not _measured(train, name):
        return None
    figure, axes = _axes("speed (tokens per second)")
    values = train[name]
    middle = median(value for value in values if math.isfinite(value))
    axes.plot(train["step"], values, color=BLUE, linewidth=1.0, marker=_marker(values))
    axes.axhline(middle, color=ORANGE, linestyle="--", linewidth=1.2, label=f"median {middle:,.0f}")
    axes.set_ylim(0, 1.1 * max(value for value in values if math.isfinite(value)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(frameon=False)
    return figure


def _axes(label: str) -> tuple[Any, Any]:
    """A figure with one pair of axes over the steps. No pyplot: its global state outlives the report."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.0), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    return figure, axes


def _measured(columns: Columns, name: str) -> bool:
    return any(math.isfinite(value) for value in columns.get(name, []))


def _marker(values: Sequence[float]) -> str:
    """A dot where a value has no neighbour to draw a line to."""
    finite = [math.isfinite(value) for value in values]
    return "" if any(a and b for a, b in pairwise(finite)) else "."


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
