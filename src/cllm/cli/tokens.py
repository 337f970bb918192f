"""``cllm tokens``: what a run's tokens are to each other."""

from __future__ import annotations

import typer

from cllm.cli import tokens_nearest

app = typer.Typer(no_args_is_help=True, help="Look into a run's tokens.")
app.command("nearest")(tokens_nearest.nearest)


@app.callback()
def _group() -> None:
    """A group, also while it has one command."""
