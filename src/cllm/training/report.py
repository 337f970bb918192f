"""``report.md`` of a run: what was trained, on what, how well, and how to do it again.

Everything in it is read from the run directory, so that it can be written anew at any time.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cllm.core.atomic import write_text
from cllm.store.listing import size_of
from cllm.store.metrics import read_lines
from cllm.store.run import RunDirectory
from cllm.store.status import Status
from cllm.training.plots import draw_plots
from cllm.training.progress import duration

_TITLES = {
    "loss": "Loss",
    "bits_per_byte": "Bits per byte",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "speed": "Speed",
}


def write_report(run_dir: Path) -> Path:
    """Write ``report.md`` and ``plots/*.png`` of the run at ``run_dir``; returns the report's path.

    Raises ``UserError`` if it is no run, its files are damaged, or the disk refuses.
    """
    run = RunDirectory.open(run_dir)
    status, config = run.status(), run.read_config()
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(run.metrics):
        lines.setdefault(line["kind"], []).append(line)
    clip = config.get("train", {}).get("clip", 0.0)
    plots = draw_plots(run.metrics, run.plots, clip=clip) if run.metrics.exists() else []
    parts = [
        f"# {run.name}",
        _headline(status, lines),
        _section("Results", _results(lines)),
        _section("What was trained", _what(run, status, config, lines)),
        _section("Token table", _token_table(status.facts)),
        _section("Corpus", _table(_pairs(status.facts.get("corpus", {})))),
        _section("Machine and time", _machine(status)),
        _section("Course", "\n\n".join(_picture(path) for path in plots)),
        _section("Samples", _samples(lines.get("sample", []))),
        _section("Skipped steps", _skipped(lines.get("skip", []))),
        _section("Warnings", "\n".join(f"- {text}" for text in status.facts.get("warnings", []))),
        _section("To do it again", _again(run, status)),
        _section("Configuration", _fenced(run.config.read_text(encoding="utf-8"), "toml")),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    # Names of files can hold bytes that are no UTF-8.
    write_text(run.report, text.encode("utf-8", "backslashreplace").decode("utf-8"))
    return run.report


def _headline(status: Status, lines: Mapping[str, list[dict[str, Any]]]) -> str:
    because = f" ({status.reason})" if status.reason else ""
    text = f"The run is **{status.state}**{because}."
    for kind, name in (("test", "test"), ("validation", "validation")):
        best = _best(lines.get(kind, []))
        if best is not None:
            return f"{text} Held-out text costs **{best['bpb']:.4f} bits per byte** ({name})."
    return text


def _results(lines: Mapping[str, list[dict[str, Any]]]) -> str:
    rows = []
    best, validations = _best(lines.get("validation", [])), lines.get("validation", [])
    if best is not None:
        rows.append(("validation, best", best))
    if validations and validations[-1] is not best:
        rows.append(("validation, last", validations[-1]))
    rows += [("test", line) for line in lines.get("test", [])[-1:]]
    if not rows:
        return ""
    names = ("step", "bpb", "loss", "perplexity")
    head = "| held-out text | step | bits per byte | loss (nats per token) | perplexity per token |"
    table = [head, "| --- | ---: | ---: | ---: | ---: |"]
    for title, line in rows:
        table.append(f"| {title} | " + " | ".join(_figure(line.get(name)) for name in names) + " |")
    return "\n".join(table)


def _what(
    run: RunDirectory,
    status: Status,
    config: Mapping[str, Any],
    lines: Mapping[str, list[dict[str, Any]]],
) -> str:
    model, train, facts = config.get("model", {}), config.get("train", {}), status.facts
    last = lines.get("train", [{}])[-1]
    shape = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "context", "vocab_size")
    rows = [
        ("parameters", facts.get("parameters")),
        ("shape", ", ".join(f"{name} {model[name]}" for name in shape if name in model)),
        ("steps", f"{last.get('step', 0):,} of {train['steps']:,}" if "steps" in train else None),
        ("tokens seen", last.get("tokens", facts.get("tokens"))),
        ("optimizer", train.get("optimizer")),
        ("training loss", _training_loss(train)),
        ("similarity loss", _similarity_loss(train.get("similarity", {}), last)),
        ("learning rate", train.get("lr")),
        ("schedule", train.get("schedule")),
        ("arithmetic", train.get("dtype")),
        ("seed", train.get("seed")),
        ("size on disk", f"{size_of(run.path) / 1e6:,.1f} MB"),
    ]
    return _table((name, value) for name, value in rows if value not in (None, ""))


def _training_loss(train: Mapping[str, Any]) -> str | None:
    """What the training loss is where it is no exact cross-entropy."""
    if train.get("loss") != "sampled":
        return None
    sampled = train.get("sampled", {})
    return (
        f"an estimate by sampled softmax, {sampled.get('candidates'):,} candidates "
        f"({sampled.get('sampler')}); validation and test are exact"
    )


def _similarity_loss(settings: Mapping[str, Any], last: Mapping[str, Any]) -> str | None:
    if not settings.get("weight"):
        return None
    text = f"weight {settings['weight']:g}, faded at {settings.get('until'):.0%} of the steps"
    found = last.get("similarity_loss")
    return text if found is None else f"{text}; {found:.4f} at the end"


def _token_table(status: Mapping[str, Any]) -> str:
    facts, rebased = status.get("table", {}), status.get("rebased", {})
    rows: list[tuple[str, Any]] = [
        ("kind", facts.get("kind")),
        ("rank", facts.get("rank")),
        ("numbers", facts.get("numbers")),
        ("bytes in a checkpoint", facts.get("bytes")),
        ("share of a dense table's", facts.get("of_dense")),
        ("energy that half the width retains", facts.get("retained_at_half")),
        ("metric of the basis", facts.get("metric of the basis")),
    ]
    bases = [*rebased.items(), *((_at_the_end(key), each) for key, each in facts.items())]
    for key, figures in bases:
        if isinstance(figures, dict):
            shortest = "λ1" if figures["shortest_is_exact"] else "shortest vector found"
            text = (
                f"defect 2^{figures['log2_defect']}, profile {figures['profile_first']} to "
                f"{figures['profile_last']} (log2), {shortest} {figures['shortest']:.4g}"
            )
            rows.append((key, text))
    rows.append(("computed core kept, bytes", facts.get("core_bytes")))
    rows.append(("read without computing it again", facts.get("core_hit_rate")))
    rows.append(("updated by rows", facts.get("updated by rows")))
    return _table((name, value) for name, value in rows if value is not None)


def _at_the_end(key: str) -> str:
    """A title for figures of the trained basis, which is as training left it."""
    name, after, method = key.partition(" after ")
    return f"{name} at the end, if {method} were applied" if after else f"{name} at the end"


def _machine(status: Status) -> str:
    rows = _pairs(status.facts.get("machine", {}))
    if status.facts.get("tokens_per_second") is not None:
        rows.append(("speed", f"{status.facts['tokens_per_second']:,.0f} tokens/s"))
    if "train_seconds" in status.facts:
        rows.append(("training time", duration(status.facts["train_seconds"])))
    for number, session in enumerate(status.sessions, 1):
        title = "session" if len(status.sessions) == 1 else f"session {number}"
        end = f"to {session.end}" if session.end else "without a recorded end"
        origin = f", resumed from step {session.from_step}" if session.from_step else ""
        rows.append((title, f"{session.start} {end}: {session.state}{origin}"))
    return _table(rows)


def _picture(path: Path) -> str:
    return f"![{_TITLES[path.stem]}]({path.parent.name}/{path.name})"


def _samples(samples: list[dict[str, Any]]) -> str:
    """What the finished model wrote; of one still in training, the samples of the last step."""
    final = [line for line in samples if line.get("final")]
    known = final or samples
    last = [line for line in known if line["step"] == known[-1]["step"]]
    parts = []
    for line in last:
        prompt = f", prompt {line['prompt']!r}" if line.get("prompt") else ""
        parts.append(f"Step {line['step']}{prompt}:\n\n{_fenced(line.get('text', ''))}")
    return "\n\n".join(parts)


def _skipped(skips: list[dict[str, Any]]) -> str:
    if not skips:
        return "None: every loss and gradient was finite."
    count = Counter(line.get("reason", "not finite") for line in skips)
    return "\n".join(
        f"- {reason}: {number} step{'s' if number > 1 else ''}"
        for reason, number in count.most_common()
    )


def _again(run: RunDirectory, status: Status) -> str:
    command = status.facts.get("command") or f"cllm train --config {shlex.quote(str(run.config))}"
    text = f"The same seed on the same data:\n\n{_fenced(command, 'sh')}"
    versions = status.facts.get("versions")
    if versions:
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        text += f"\n\nMade with {shown}."
    return text


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else ""


def _pairs(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name.replace("_", " "), value) for name, value in facts.items()]


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def _fenced(text: str, language: str = "") -> str:
    """``text`` as a code block, with a fence longer than any in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _best(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The line with the fewest bits per byte, or ``None`` if none has any."""
    measured = [line for line in lines if line.get("bpb") is not None]
    return min(measured, key=lambda line: line["bpb"], default=None)
