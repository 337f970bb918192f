"""``cllm export`` and ``cllm verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm.cli.use import RunPath

FORMATS = "hf, gguf, onnx, torch-export, aoti or torchscript."


def export(
    run: RunPath,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=FORMATS)],
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="The file or directory to make."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="How weights are stored; each format has a list of its own.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Open the file in its own program and compare."),
    ] = True,
) -> None:
    """Write a run as a file that another program runs, and see that it gives the same answers."""
    from cllm.core.threads import spin_briefly

    spin_briefly()  # before torch is loaded

    from cllm.export.export import export as export_run
    from cllm.training.progress import open_progress

    progress = open_progress(quiet=False)
    made = export_run(run, to, out=out, dtype=dtype, force=force, checking=check, say=progress.say)
    typer.echo(f"{made.path}: {made.format}, {made.dtype}, {made.bytes:,} bytes")
    typer.echo(made.checked.line() if made.checked else "not checked (--no-check)")


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `cllm export` wrote.")],
    run: Annotated[Path, typer.Option("--run", metavar="RUN", help="The run it was made from.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PATH", help="Other text to score; may be repeated."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Bits per byte that the file may be worse than the run.")
    ] = 0.01,
) -> None:
    """Score an exported file in its own program on held-out text; exit code 1 past the threshold."""
    from cllm.core.threads import spin_briefly

    spin_briefly()  # before torch is loaded

    from cllm.export.verify import verify as verify_file

    result = verify_file(file, run, data=data or (), threshold=threshold)
    typer.echo(result.line())
    if not result.holds:
        raise typer.Exit(1)
