"""``cllm reduce``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


def reduce(
    run: Annotated[Path, typer.Argument(help="A run, or a checkpoint of one.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Coordinates of a token.")] = None,
    retain: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="The least rank that retains this share of the table."),
    ] = None,
    reduction: Annotated[
        Literal["none", "lll", "bkz", "hkz"],
        typer.Option(help="Lattice reduction of the basis; the table stays the same."),
    ] = "none",
    metric: Annotated[
        Literal["identity", "hidden"],
        typer.Option(
            help="What lattice reduction calls short: `hidden` is what errors cost the scores."
        ),
    ] = "identity",
    then_train: Annotated[
        int, typer.Option(min=0, metavar="N", help="Train N more steps with the reduced table.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run directory to make.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the results only.")] = False,
) -> None:
    """Make a run whose token table is a product of two smaller ones, from a run that is trained.

    The table (V×D) becomes core (V×rank) times basis (rank×D): the best of its rank, by principal axes.
    Lattice reduction then makes the basis more orthogonal, which matters where coordinates are rounded.
    """
    from cllm.core.threads import spin_briefly

    spin_briefly()  # before torch is loaded

    from cllm.training.progress import open_progress
    from cllm.training.reduce import reduce_run

    outcome = reduce_run(
        run,
        open_progress(quiet=quiet),
        rank=rank,
        retain=retain,
        reduction=reduction,
        metric=metric,
        then_train=then_train,
        out=out,
        command=shlex.join(["cllm", *sys.argv[1:]]),
    )
    for line in outcome.lines():
        typer.echo(line)
    typer.echo(f"run: {outcome.run.path}")
    typer.echo(f"report: {outcome.run.report}")
