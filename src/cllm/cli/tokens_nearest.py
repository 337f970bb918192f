"""``cllm tokens nearest``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cllm.cli.terminal import printable
from cllm.cli.use import RunPath
from cllm.core.errors import UsageError, UserError, value_errors_as

if TYPE_CHECKING:
    import numpy as np


def nearest(
    run: RunPath,
    wanted: Annotated[
        str,
        typer.Argument(
            metavar="WORD|VECTOR.npy",
            help="A word that is one token (a space before it is tried, too), a token's id as '#123', or a "
            "vector's file.",
        ),
    ],
    k: Annotated[int, typer.Option("-k", help="How many tokens.")] = 10,
    metric: Annotated[
        str, typer.Option(help="cosine, ip (inner product) or l2 (distance).")
    ] = "cosine",
    table: Annotated[
        str, typer.Option(help="Whose vectors: of the input or the output table (often the same).")
    ] = "input",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the tokens whose learned vectors are closest to a token's, or to a vector."""
    from cllm.api import load
    from cllm.infer.lookup.metric import METRICS
    from cllm.infer.lookup.tokens import token_neighbours, token_of, token_text
    from cllm.model.factors import check_finite

    if metric not in METRICS:
        raise UsageError(f"--metric {metric} is none of {', '.join(METRICS)}")
    if table not in ("input", "output"):
        raise UsageError(f"--table {table} is neither input nor output")
    if k < 1:
        raise UsageError(f"-k must be at least 1, got {k}")
    if run.suffix == ".json":
        raise UserError(f"{run} has no vectors: name a run, or a model that `cllm compress` wrote")
    vector = read_vector(Path(wanted)) if wanted.endswith(".npy") else None
    loaded = load(run)
    asked = token_of(loaded.tokenizer, wanted) if vector is None else vector
    model = loaded.model
    known = loaded.tokenizer.vocab_size  # further rows are no tokens'
    vectors = (model.embedding if table == "input" else model.output).table()[:known]
    others = known if vector is not None else known - 1
    if k > others:
        raise UsageError(f"-k {k} is more than the {others:,} tokens that there are besides")
    with value_errors_as(UserError):
        check_finite(vectors, f"{table} table of {run}")
        found = token_neighbours(vectors, loaded.tokenizer, asked, k, metric)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(token) for token in found], ensure_ascii=False))
        return
    if isinstance(asked, int):
        name = token_text(loaded.tokenizer, asked)
        typer.echo(f"closest to {printable(name)} (#{asked}):", err=True)
    for token in found:
        text = printable(token_text(loaded.tokenizer, token.id))
        typer.echo(f"{token.score:10.4f}  {token.id:>8}  {text}")


def read_vector(path: Path) -> np.ndarray:
    """The array in a .npy file. Raises ``UserError`` if it is missing or holds no numbers."""
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a .npy file of numbers ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(f"{path}: not one array of numbers; save a vector with numpy.save")
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds NaN or infinity; save another vector")
    return array
