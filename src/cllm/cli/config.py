"""``cllm config`` and ``cllm info``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Show the settings, their defaults and meanings.")

File = Annotated[Path | None, typer.Option("--config", metavar="FILE.toml", help="A TOML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated."),
]


@app.command()
def show(
    config: File = None,
    settings: Settings = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print TOML to start a file from.")] = False,
) -> None:
    """Show every setting with its value and meaning."""
    from rich.console import Console
    from rich.table import Table

    from cllm.core.settings import explain, load_config, to_toml

    whole = load_config(config, settings or ())
    if toml:
        typer.echo(to_toml(whole), nl=False)
        return
    table = Table("setting", "value", "meaning", box=None, pad_edge=False)
    for key, value, meaning in explain(whole):
        table.add_row(key, value, meaning)
    Console(soft_wrap=False).print(table)


@app.command()
def schema() -> None:
    """Print the JSON schema of a configuration file, for editors."""
    from cllm.core.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


def info(
    config: File = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show this machine, and what training would choose on it and why."""
    from rich.console import Console
    from rich.table import Table

    from cllm.core.machine import describe
    from cllm.core.settings import load_config, merge
    from cllm.training.choose import choose

    whole = load_config(config, settings or ())
    if whole.model.vocab_size is None:
        whole = merge(whole, {"model.vocab_size": whole.tokenizer.vocab_size})
    rows = [*describe(), *((f"train.{k}", v) for k, v in choose(whole).reasons.items())]
    if as_json:
        typer.echo(json.dumps(dict(rows), indent=2))
        return
    table = Table("", "", box=None, show_header=False, pad_edge=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)
