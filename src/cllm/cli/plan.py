"""``cllm plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cllm.cli.options import ConfigFile, Preset, Settings

if TYPE_CHECKING:
    from cllm.core.config import Config
    from cllm.training.plan.estimate import Estimate
    from cllm.training.plan.forecast import Plan


def plan(
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="PATH", help="The text, whose tokens are counted; may be repeated."
        ),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, metavar="N", help="Tokens of the text, as 1e9.")
    ] = None,
    machines: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Devices to plan for; this machine, measured, if left out."
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Numbers of devices, instead of those of the list."),
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    preset: Preset = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Forecast memory, time and communication of a training run, and the best way to share it out.

    Nothing is trained. This machine is measured once, in some seconds; other machines are what their list
    says.
    """
    from cllm.core.errors import UsageError
    from cllm.core.settings import parse_setting

    if data and tokens is not None:
        raise UsageError(
            "--data and --tokens both say how much text there is: leave one of them out"
        )
    if devices is not None and machines is None:
        raise UsageError("--devices are counts of the machines of a list: give --machines, too")
    counts = _counts(devices)
    changes = dict(map(parse_setting, settings or ()))
    if preset is not None:
        changes["model.preset"] = preset
    if data:
        changes["data.paths"] = tuple(data)

    from cllm.api import resolve_config
    from cllm.training.plan.forecast import plan_on
    from cllm.training.plan.here import plan_here
    from cllm.training.plan.machines import read_machines

    entries = read_machines(machines) if machines is not None else []
    whole, count = _sized(resolve_config(config, changes), data, tokens)
    if entries:
        made = plan_on(whole, entries, counts, count)
    else:
        made = plan_here(whole, count, lambda text: typer.echo(text, err=True))
    if as_json:
        typer.echo(json.dumps(made.to_json()))
        return
    given: list[tuple[str, object]] = [("--config", config), ("--preset", preset)]
    given += [("--data", path) for path in data or ()] + [
        ("--set", text) for text in settings or ()
    ]
    _show(made, [str(word) for pair in given if pair[1] is not None for word in pair])


def _counts(text: str | None) -> list[int]:
    from cllm.core.errors import UsageError

    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(f"--devices wants numbers like 1,8,64, not {text!r}")
    return [int(word) for word in words]


def _sized(
    config: Config, data: list[str] | None, tokens: float | None
) -> tuple[Config, int | None]:
    """The configuration with its vocabulary, and the tokens of the text, as far as it is known."""
    import tempfile

    from cllm.core.machine import cache_dir
    from cllm.core.settings import merge

    count = int(tokens) if tokens is not None else None
    size = config.tokenizer.vocab_size
    if data:
        from cllm.text.corpus import prepare

        with tempfile.TemporaryDirectory() as place:
            prepared = prepare(
                config.data,
                config.tokenizer,
                Path(place),
                seed=config.train.seed,
                context=config.model.context,
                cache=cache_dir() / "data",
            )
            count, size = len(prepared.train), prepared.tokenizer.vocab_size
    if config.model.vocab_size is None:
        config = merge(config, {"model.vocab_size": size})
    return config, count


def _show(made: Plan, options: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("strategy", "devices", "memory", "state", "activations", "logits", "step"):
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for name in ("of it sending", "waiting", "sent", "tokens/s", "one pass"):
        table.add_column(name, justify="right", no_wrap=True)
    for estimate in made.estimates:
        table.add_row(*_cells(made, estimate))
    console = Console()
    console.width = max(console.width, 200)  # a narrow terminal wraps lines better than cells
    typer.echo(f"{made.where}: {made.parameters:,} parameters")
    console.print(table)
    lines = [f"{e.strategy} on {e.devices:,}: {e.obstacle}" for e in made.estimates if e.obstacle]
    lines += made.notes
    if made.compiling:
        lines.append(f"compiling takes up to {made.compiling:.0f} s before the first step")
    for line in [*lines, *_verdict(made, options)]:
        typer.echo(line)


def _verdict(made: Plan, options: list[str]) -> list[str]:
    """The best in one line; where no command runs it, the best of those with one in another."""
    best = made.best
    if best is None:
        return ["nothing of this is possible as it is: see above"]
    command = made.command(best, options)
    if command:
        return [f"best: {best.strategy} on {best.devices:,}: {command}"]
    lines = [f"best: {best.strategy} on {best.devices:,}; cllm has no command for it"]
    able = [e for e in made.estimates if not e.obstacle and made.command(e)]
    if able:
        next_best = max(able, key=lambda e: e.tokens_per_second)
        command = made.command(next_best, options)
        lines.append(f"best with one: {next_best.strategy} on {next_best.devices:,}: {command}")
    return lines


def _cells(made: Plan, estimate: Estimate) -> list[str]:
    memory = estimate.memory
    first = [estimate.strategy, f"{estimate.devices:,}"]
    if not memory.total:
        return first + ["–"] * 10
    hours = made.hours(estimate)
    return [
        *first,
        _size(memory.total),
        _size(memory.weights + memory.gradients + memory.optimizer),
        _size(memory.activations),
        _size(memory.logits),
        _time(estimate.seconds),
        _time(estimate.communication),
        _time(estimate.waiting),
        _size(estimate.sent),
        f"{estimate.tokens_per_second:,.0f}" if estimate.tokens_per_second else "–",
        _time(3600 * hours) if hours is not None else "–",
    ]


def _size(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


def _time(seconds: float) -> str:
    for unit, size in (("d", 172_800.0), ("h", 7_200.0), ("min", 120.0), ("s", 2.0)):
        if seconds >= size:
            whole = {"d": 86_400.0, "h": 3_600.0, "min": 60.0, "s": 1.0}[unit]
            return f"{seconds / whole:,.1f} {unit}"
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"
