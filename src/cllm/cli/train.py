"""``cllm train``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cllm.cli.options import ConfigFile, Preset, Settings
from cllm.cli.terminal import printable

if TYPE_CHECKING:
    from cllm.core.torchrun import Launch


def train(
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="A file, directory, glob or hf:NAME; may be repeated. The built-in corpus if left out.",
        ),
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    preset: Preset = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run directory to make.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Go on with a run from its last checkpoint (or DIR's)."),
    ] = None,
    from_run: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Fine-tune: start from this run's best weights."
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            metavar="10m", help="Choose the number of steps so that all ends in this time."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the results only.")] = False,
) -> None:
    """Train a model on text, score it on held-out text, and let it write.

    Without options it trains the `tiny` model on the built-in corpus. Everything goes into one run
    directory, which `cllm eval`, `cllm generate` and `cllm train --resume` take.
    """
    from cllm.core.duration import parse_duration
    from cllm.core.errors import UsageError
    from cllm.core.settings import parse_setting
    from cllm.core.torchrun import end_with_torchrun, launched, leave

    launch = launched()
    if launch is not None:
        end_with_torchrun()  # before torch is loaded, which takes seconds
        if not launch.is_first:
            _follow(launch)
    given = {"--data": data, "--config": config, "--out": out, "--from": from_run, "--time": time}
    given["--preset"] = preset
    if resume is not None:
        extra = [name for name, value in given.items() if value]
        if extra:
            raise UsageError(f"--resume goes on with a run as it is: leave out {', '.join(extra)}")
    changes = dict(map(parse_setting, settings or ()))
    if data:
        changes["data.paths"] = tuple(data)
    if preset is not None:
        changes["model.preset"] = preset
    seconds = parse_duration(time) if time is not None else None

    from cllm.core.threads import spin_briefly

    spin_briefly()  # before torch is loaded

    from cllm.api import resolve_config
    from cllm.training.progress import open_progress
    from cllm.training.session import resume as go_on
    from cllm.training.session import start

    progress = open_progress(quiet=quiet)
    if resume is not None:
        outcome = go_on(resume, settings or (), progress)
    else:
        outcome = start(
            resolve_config(config, changes, from_run),
            progress,
            out=out,
            from_run=from_run,
            seconds=seconds,
            command=shlex.join(["cllm", *sys.argv[1:]]),
        )
    for line in outcome.lines():
        typer.echo(line)
    if not quiet:
        for number, text in enumerate(outcome.samples, 1):
            typer.echo(f"\nsample {number}:\n{printable(text)}")
        typer.echo("")
    typer.echo(f"run: {outcome.run.path}")
    typer.echo(f"report: {outcome.run.report}")
    if launch is not None:
        leave(0)


def _follow(launch: Launch) -> NoReturn:
    """Any process of torchrun but the first: it does what the first says."""
    from cllm.core.threads import spin_briefly
    from cllm.core.torchrun import leave_on_signals

    leave_on_signals()
    spin_briefly()

    from cllm.training.distributed.entry import follow

    follow(launch)
