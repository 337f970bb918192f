"""What ``cllm bench compress`` draws, and how well the certificate foretells what is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm.bench import compress_cases as known
from cllm.bench.harness import Claim

COLORS = {
    known.GPTQ: "#D55E00",
    known.OURS: "#0072B2",
    known.CODED_GPTQ: "#E69F00",
    known.CODED_OURS: "#009E73",
    "HQQ": "#CC79A7",
    "torchao int": "#7F7F7F",
    "llama.cpp": "#56B4E9",
}
"""Okabe and Ito's palette (2008)."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A rise that was predicted, and what came about, bits per byte."""

    method: str
    predicted: float
    low: float
    high: float
    measured: float


def points_of(found: Mapping[known.Case, Mapping[str, Any]]) -> list[Point]:
    """The predictions among one run's figures."""
    return [
        Point(
            method=case.method,
            predicted=f["predicted"],
            low=f["low"],
            high=f["high"],
            measured=f["bpb"] - f["base"],
        )
        for case, f in found.items()
        if "predicted" in f
    ]


def r_squared(points: Sequence[Point]) -> float | None:
    """1 − Σ(measured − predicted)² / Σ(measured − mean)²; ``None`` for fewer than three points. Predictions
    are taken as they are: nothing is fitted to what was measured."""
    if len(points) < 3:
        return None
    measured = np.array([p.measured for p in points])
    rest = measured - [p.predicted for p in points]
    whole = float(((measured - measured.mean()) ** 2).sum())
    return 1 - float((rest**2).sum()) / whole if whole else None


def certificate_claim(points: Sequence[Point], quick: bool) -> Claim:
    """How much of the variance of the measured rises the predictions have."""
    inside = sum(p.low <= p.measured <= p.high for p in points)
    why = "quick: too small to judge" if quick else ""
    value = r_squared(points)
    if not quick and value is None:
        why = f"{len(points)} predictions of at least 3"
    return Claim(
        name=f"R² of the certificate's predicted rises ({inside} of {len(points)} measured ones lie within "
        "their intervals)",
        value=value,
        required=0.9,
        why=why,
        judged=not why,
    )


def errors_claim(measured: Sequence[Mapping[known.Case, Mapping[str, Any]]], quick: bool) -> Claim:
    """How well the errors of single layers are foretold, of which some are a thousand times others."""
    pairs = [pair for found in measured for f in found.values() for pair in f.get("errors", ())]
    logs = np.log(np.array(pairs, dtype=np.float64).reshape(-1, 2).clip(1e-300))
    told, got = logs[:, 0], logs[:, 1]
    whole = float(((got - got.mean()) ** 2).sum()) if len(got) > 2 else 0.0
    why = "quick: too small to judge" if quick else "" if whole else "not measured"
    return Claim(
        name=f"R² of the certificate's logarithms of layer errors ({len(pairs)} layers)",
        value=1 - float(((got - told) ** 2).sum()) / whole if whole else None,
        required=0.9,
        why=why,
        judged=not why,
    )


def draw(rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> dict[str, Any]:
    """Figures by name: rise against bits by method, and measured against predicted rises."""
    figures = {}
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["method"] in COLORS and row["rise"] is not None and row["rise"] > 0:
            lines.setdefault(row["method"], []).append((row["bits a weight"], row["rise"]))
    if lines:
        figures["bits"] = _bits(lines)
    seen = [p for p in points if min(p.predicted, p.measured) > 0]
    if len(seen) > 2:
        figures["certificate"] = _certificate(seen)
    return figures


def _bits(lines: Mapping[str, list[tuple[float, float]]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, places in lines.items():
        bits, rises = zip(*sorted(places), strict=True)
        axes.plot(bits, rises, marker="o", label=method, color=COLORS[method])
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight of the linear layers, everything counted")
    axes.set_ylabel("rise of the bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _certificate(points: Sequence[Point]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(p.method for p in points):
        own = [p for p in points if p.method == method]
        middle = np.array([p.predicted for p in own])
        ends = np.array([[p.predicted - p.low, p.high - p.predicted] for p in own]).T
        # An interval that reaches below 0 has no end on this axis.
        ends[0] = np.minimum(ends[0], 0.999 * middle)
        color = COLORS.get(method)
        axes.errorbar(
            middle,
            [p.measured for p in own],
            xerr=ends,
            fmt="o",
            ms=4,
            lw=1,
            label=method,
            color=color,
        )
    every = [v for p in points for v in (p.predicted, p.measured)]
    both = [min(every), max(every)]
    axes.plot(both, both, color="black", lw=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(both[0] / 2, both[1] * 2)
    axes.set_xlabel("rise predicted before compressing, bits per byte")
    axes.set_ylabel("rise measured")
    axes.legend(frameon=False, fontsize=8)
    return figure
