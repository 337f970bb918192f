"""``cllm eval``, and the argument that names a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

RunPath = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run directory, one of its checkpoints, or a FILE.cllm."),
]


def evaluate(
    run: RunPath,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PATH", help="Other text to score; may be repeated."),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Which of the run's own splits: train, validation or test.")
    ] = "validation",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")] = False,
) -> None:
    """Score held-out text in bits per byte (less is better)."""
    from cllm.core.threads import spin_briefly

    spin_briefly()  # before torch is loaded

    from cllm.api import load
    from cllm.training.progress import open_progress

    result = load(run).evaluate(data or (), split=split, progress=open_progress(quiet=quiet))
    if as_json:
        typer.echo(json.dumps(result.to_json()))
        return
    what = ", ".join(data) if data else split
    typer.echo(
        f"{what}: {result.bpb:.4f} bits per byte (loss {result.loss:.4f} nats per token, "
        f"perplexity {result.perplexity:.1f}, {result.bytes:,} bytes, {result.tokens:,} tokens)"
    )
