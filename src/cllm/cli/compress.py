"""``cllm compress``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def compress(
    run: Annotated[Path, typer.Argument(help="A run, or a checkpoint of one.")],
    bits: Annotated[
        float,
        typer.Option(help="Bits a weight: 2, 3, 4 or 8; any number with --grid coded."),
    ] = 4.0,
    method: Annotated[
        str | None,
        typer.Option(
            help="rtn, babai (GPTQ), k-best, k-best-lll, k-best-bkz, klein, int8, fp16, bf16 or fp32; "
            "k-best if left out, with --prune fp16."
        ),
    ] = None,
    grid: Annotated[
        str,
        typer.Option(
            help="int, gguf-q4_0, gguf-q8_0, coded (points without bounds, entropy coded), e8 or leech."
        ),
    ] = "int",
    lattice: Annotated[
        str, typer.Option(help="Points of --grid coded: z, integers, or e8 or leech, in blocks.")
    ] = "z",
    rotate: Annotated[
        str, typer.Option(help="hadamard: round a randomly rotated matrix; or none.")
    ] = "none",
    group: Annotated[
        str, typer.Option(metavar="32|64|128|row", help="Columns that share a scale.")
    ] = "128",
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="No offset, or one beside each scale."),
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams of k-best.")] = 16,
    scales: Annotated[str, typer.Option(help="range, search or least-squares.")] = "least-squares",
    metric: Annotated[
        str,
        typer.Option(
            help="What errors cost: inputs (the layer's outputs), model (its predictions), or auto: model "
            "for k-best on integers."
        ),
    ] = "auto",
    order: Annotated[str, typer.Option(help="natural, act or min-pivot.")] = "act",
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA", help="Text for calibration; the run's training split if left out."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of calibration.")] = 32_768,
    prune: Annotated[
        str,
        typer.Option(
            metavar="50%|2:4", help="Set so many weights of each layer to 0, and store it sparse."
        ),
    ] = "",
    recover: Annotated[
        int, typer.Option(metavar="N", help="Train scales, norms and codes for N steps afterwards.")
    ] = 0,
    recover_codes: Annotated[
        bool,
        typer.Option(
            "--recover-codes/--keep-codes", help="Whether recovery may move the integers."
        ),
    ] = True,
    table: Annotated[
        str,
        typer.Option(
            help="Token tables: lattice, int8, fp16, bf16, fp32, or own (the points of the lattice that "
            "they were trained on; auto takes these where there are some, else lattice)."
        ),
    ] = "auto",
    table_bits: Annotated[
        float | None,
        typer.Option(help="Bits a number of the tables, with --table lattice; 6 if not given."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="600KB", help="Bytes of the file: rates are allotted to fit."),
    ] = None,
    target_bpb_increase: Annotated[
        str | None,
        typer.Option(metavar="1%", help="The fewest bits whose validation text stays within this."),
    ] = None,
    predict: Annotated[
        bool,
        typer.Option(
            "--predict", help="Only say what rise of the bits per byte is to be expected, and stop."
        ),
    ] = False,
    certificate: Annotated[
        bool,
        typer.Option(
            "--certificate", help="Predict the rise first, and report it beside the measured one."
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.cllm", help="The file to make.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the results only.")] = False,
) -> None:
    """Make a compressed model in one file, which `cllm generate` and `cllm eval` take.

    Each layer's weights are rounded to the points of a grid so that its outputs on calibration text
    change least. The same command goes on where it was interrupted.
    """
    from cllm.core.threads import spin_briefly

    spin_briefly()  # before torch is loaded

    from cllm.compress.command import compress_run, predict_run
    from cllm.compress.report import summary, write_report
    from cllm.compress.settings import Settings
    from cllm.training.progress import open_progress

    settings = Settings(
        bits=bits,
        method=method or ("fp16" if prune else "k-best"),
        grid=grid,
        lattice=lattice,
        rotate=rotate,
        group=group,
        symmetric=symmetric,
        beams=beams,
        scales=scales,
        metric=metric,
        order=order,
        tokens=tokens,
        prune=prune,
        recover=recover,
        recover_codes=recover_codes,
        table="lattice" if table == "auto" and table_bits is not None else table,
        table_bits=6.0 if table_bits is None else table_bits,
    )
    if predict:
        said = predict_run(run, settings, open_progress(quiet=quiet), calibration=calibration or ())
        typer.echo(said)
        return
    made = compress_run(
        run,
        settings,
        open_progress(quiet=quiet),
        out=out,
        calibration=calibration or (),
        size=size,
        increase=target_bpb_increase,
        predict=certificate,
    )
    report = write_report(made, shlex.join(["cllm", *sys.argv[1:]]))
    for line in summary(made):
        typer.echo(line.removeprefix("- "))
    typer.echo(f"file: {made.path}")
    typer.echo(f"report: {report}")
