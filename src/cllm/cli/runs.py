"""``cllm runs``: list, compare and clean the runs on this disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="List, compare and clean runs.", no_args_is_help=True)

Root = Annotated[Path, typer.Argument(help="The directory that holds the runs.")]


class Layout(StrEnum):
    """How a checkpoint lies on the disk."""

    whole = "whole"
    sharded = "sharded"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("list")
def list_(root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """List runs with their state, size and results (bits per byte: less is better)."""
    from cllm.store.listing import list_runs

    rows = list_runs(root)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    elif not rows:
        typer.echo(f"No runs in {root}; `cllm train` makes one.")
    else:
        titles = (
            "run",
            "state",
            "step",
            "parameters",
            "val bpb",
            "test bpb",
            "tok/s",
            "disk",
            "made",
        )
        _print_table(
            titles,
            [
                (
                    row.name,
                    row.state,
                    _text(row.step) + (f"/{row.steps}" if row.steps else ""),
                    _count(row.parameters),
                    _bits(row.validation_bpb),
                    _bits(row.test_bpb),
                    _count(row.tokens_per_second),
                    _size(row.bytes),
                    row.date[:16].replace("T", " "),
                )
                for row in rows
            ],
            left=(0, 1),
        )


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more runs.")], as_json: AsJson = False
) -> None:
    """Show in which settings runs differ, and their results side by side."""
    from cllm.store.listing import compare as compare_runs
    from cllm.store.run import RunDirectory

    result = compare_runs([RunDirectory.open(path) for path in runs])
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
        return
    shown = {"bytes": _size, "validation_bpb": _bits, "test_bpb": _bits}
    shown |= {"parameters": _count, "tokens_per_second": _count}
    settings = [(key, *map(_text, values)) for key, values in result.settings]
    results = [(key, *map(shown.get(key, _text), values)) for key, values in result.results]
    if settings:
        _print_table(("setting", *result.names), settings, left=(0,))
    else:
        typer.echo("The settings are the same.")
    _print_table(("result", *result.names), results, left=(0,))


@app.command()
def clean(
    root: Root = Path("runs"),
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints", help="Also delete all checkpoints but each run's best and last."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be deleted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete what killed processes left behind and runs without a checkpoint."""
    from cllm.store.cleaning import clean as delete
    from cllm.store.cleaning import find_waste

    waste = find_waste(root, checkpoints=checkpoints)
    size = sum(item.bytes for item in waste) if dry_run else delete(waste)
    if as_json:
        items = [asdict(item) | {"path": str(item.path)} for item in waste]
        typer.echo(json.dumps({"deleted": not dry_run, "bytes": size, "items": items}, indent=2))
        return
    for item in waste:
        typer.echo(f"{item.path}  {_size(item.bytes)}  {item.why}")
    typer.echo(f"{'would free' if dry_run else 'freed'} {_size(size)} in {len(waste)} places")


@app.command()
def convert(
    run: Annotated[Path, typer.Argument(help="A run, or one of its checkpoints.")],
    to: Annotated[
        Layout, typer.Option(help="whole: one file; sharded: torch's distributed checkpoint.")
    ] = Layout.whole,
) -> None:
    """Write checkpoints anew in one file, or as the shards that fsdp writes."""
    from cllm.store.checkpoint import convert as write_anew
    from cllm.store.lock import locked
    from cllm.store.run import RunDirectory
    from cllm.store.steps import locate, step_directory

    found = RunDirectory.open(run)
    _, only = locate(run)
    with locked(found.path, typer.echo):
        for step in found.steps() if only is None else [only]:
            directory = step_directory(found.path, step)
            if write_anew(directory, to_shards=to is Layout.sharded):
                typer.echo(f"{directory}: now {to.value}")
            else:
                typer.echo(f"{directory}: {to.value} already")


def _print_table(
    titles: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[int, ...]
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    # In a pipe nothing is cut to the width of a window that is not there.
    Console(width=None if console.is_terminal else 1_000, markup=False, highlight=False).print(
        table
    )


def _text(value: Any) -> str:
    return "–" if value is None else str(value)


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
