"""The report of a compressed model: ``report.md`` with figures and plots, beside the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cllm.compress.compressed import Compressed
from cllm.core.atomic import new_file, write_text


def write_report(made: Compressed, command: str = "") -> Path:
    """Write ``NAME-report/report.md`` and its plots beside the file; returns the report's path.

    Raises ``UserError`` if the disk refuses.
    """
    folder = made.path.with_name(f"{made.path.stem}-report")
    folder.mkdir(exist_ok=True)
    _plot(made, "bits", "bits a weight", folder / "bits.png")
    _plot(made, "error", "squared error over squared size of the outputs", folder / "error.png")
    parts = [
        f"# {made.path.name}",
        "\n".join(summary(made)),
        _layers(made.layers),
        *([] if made.forecast is None else [_forecast(made)]),
        "![Bits a weight](bits.png)\n\n![Error](error.png)",
        "## Settings\n\n"
        + "\n".join(f"- {name}: {value}" for name, value in made.settings.to_json().items()),
    ]
    if command:
        parts.append(f"Made by `{command}`.")
    path = folder / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def summary(made: Compressed) -> list[str]:
    """What a person wants to know, in a few lines."""
    lines = [
        f"- file: {made.bytes:,} bytes, {made.bits_per_weight:.2f} bits for each of "
        f"{made.parameters:,} parameters, everything counted",
        f"- linear layers: {made.layer_bits:.3f} bits a weight, scales and all else of theirs included",
    ]
    if made.bpb is not None and made.base is not None and made.rise is not None:
        lines.append(
            f"- bits per byte of validation text: {made.bpb:.4f}, {made.base:.4f} before "
            f"({made.rise / made.base:+.2%})"
        )
    if made.forecast is not None:
        known = made.forecast
        words = f"{known['rise']:.4f}, between {known['low']:.4f} and {known['high']:.4f}"
        got = "" if made.rise is None else f"; measured: {made.rise:.4f}"
        lines.append(f"- rise predicted before: {words}{got}")
    if made.recovery is not None:
        lines.append(f"- recovery: {_recovered(made)}")
    return lines


def _recovered(made: Compressed) -> str:
    """What recovery did, in a line."""
    assert made.recovery is not None
    found = made.recovery
    if not found["step"]:
        return "no step was better than none on text held out; nothing was changed"
    words = f"the state after step {found['step']} of {made.settings.recover}"
    if found["bpb_before"] is not None and made.base is not None:
        rise = found["bpb_before"] - made.base
        words += f"; {found['bpb_before']:.4f} bits per byte without it ({rise / made.base:+.2%})"
    return (
        f"{words}; divergence from the run's own predictions on text held out "
        f"{found['divergence']:.4f} nats a token, {found['divergence_before']:.4f} without it"
    )


def _layers(layers: list[dict[str, Any]]) -> str:
    rows = [
        "| weight | shape | bytes | bits a weight | error |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for layer in layers:
        shape = " × ".join(map(str, layer["shape"]))
        rows.append(
            f"| {layer['name']} | {shape} | {layer['bytes']:,} | {layer['bits']:.3f} | "
            f"{layer['error']:.3g} |"
        )
    note = (
        "The error of a layer is Σ(w − ŵ)H(w − ŵ)ᵀ over ΣwHwᵀ, H of its own calibration inputs; a token "
        "table's is Σ(w − ŵ)² over Σw²."
    )
    if any("moved" in layer for layer in layers):
        note += " It is that before recovery, which judges by the whole model."
    return "\n".join(rows) + f"\n\n{note}"


def _forecast(made: Compressed) -> str:
    """The certificate's layers beside what became of them."""
    assert made.forecast is not None
    measured = {layer["name"]: layer["error"] for layer in made.layers}
    rows = [
        "## Certificate",
        "",
        "| weight | error, predicted | error | gain | rise by itself, predicted |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for layer in made.forecast["layers"]:
        rows.append(
            f"| {layer['name']} | {layer['error']:.3g} | {measured[layer['name']]:.3g} | "
            f"{layer['gain']:.3f} | {layer['rise']:.5f} ± {layer['sigma']:.5f} |"
        )
    rows += [
        "",
        "Gain: the decoder's error over what the Gram–Schmidt profile lets expect of nearest plane, on a "
        f"few rows. Token tables by themselves: {made.forecast['tables']:.5f}.",
    ]
    return "\n".join(rows)


def _plot(made: Compressed, key: str, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    names = [layer["name"].removesuffix(".weight") for layer in made.layers]
    figure = Figure(figsize=(7, 0.22 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(names)), [layer[key] for layer in made.layers], color="#4878a8")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(title)
    with new_file(path) as file:
        figure.savefig(file, dpi=110, format="png")
