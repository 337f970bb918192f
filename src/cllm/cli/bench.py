"""``cllm bench``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="Which bench: train, attention, original, startup, lattice, layout, embed, tables, "
            "lookup, codes, parallel, plan, compress or infer."
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="PATH", help="Text to use (`compress`: or runs); may be repeated."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 1 when a claim falls short.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small and inexact, for tests.")] = False,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="`original`: each technique alone, and all together.")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="`embed`, `compress`, `lookup`: begin nothing after this; call again to go on.",
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Also write docs/results/NAME.md below this directory.")
    ] = False,
) -> None:
    """Measure a claim on this machine, beside its peers, and print the figures."""
    from cllm.bench.harness import Options, load_bench, render, write_results
    from cllm.core.errors import UsageError

    if quick and write:
        raise UsageError("--quick measures nothing worth writing; leave out --quick or --write")
    options = Options(
        data=tuple(data or ()), quick=quick, ladder=ladder, minutes=minutes, write=write
    )
    result = load_bench(name, options)(options)
    typer.echo(json.dumps(result.to_json()) if as_json else render(result))
    if write:
        typer.echo(f"written: {write_results(result, sys.argv[1:])}", err=True)
    if check and not result.holds:
        raise typer.Exit(1)
