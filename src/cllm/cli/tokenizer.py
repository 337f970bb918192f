"""``cllm tokenizer``: train a tokenizer by itself, and look into one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Train a byte-level BPE tokenizer by itself, or look into one.",
)


@app.command()
def train(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA",
            help="Files, directories, globs or hf:NAME; the built-in corpus if none are given.",
            show_default=False,
        ),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(help="Entries, the 256 bytes and the special tokens included.")
    ] = 4096,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("tokenizer.json"),
    special: Annotated[
        list[str] | None,
        typer.Option(help="A further special token; may be repeated.", show_default=False),
    ] = None,
    sample_bytes: Annotated[
        int, typer.Option(help="At most this many bytes of the text are used, drawn by the seed.")
    ] = 100_000_000,
    field: Annotated[str, typer.Option(help="The field of a JSONL record with the text.")] = "text",
    order: Annotated[
        str,
        typer.Option(
            help="Numbering of the ids: tokenizer, frequency, ulam, morton, hilbert, random."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Draws the sample from a larger text.")] = 0,
) -> None:
    """Train a tokenizer on text, for `--set tokenizer.file=FILE` of a later `cllm train`.

    (`cllm train` trains one of its own, on its training split alone, unless it is given a file.)
    """
    import tempfile

    from cllm.core.atomic import clear_errors
    from cllm.core.config import Config
    from cllm.core.settings import merge
    from cllm.text.corpus import tokenizer_from

    values = {
        "tokenizer.vocab_size": vocab_size,
        "tokenizer.sample_bytes": sample_bytes,
        "tokenizer.special_tokens": tuple(special or ()),
        "tokenizer.order": order,
    }
    settings = merge(Config(), values).tokenizer
    with clear_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=out.parent)
    with place as directory:
        tokenizer, used = tokenizer_from(data or (), settings, directory, field=field, seed=seed)
    tokenizer.save(out)
    typer.echo(f"{out}: {tokenizer.vocab_size:,} tokens from {used:,} bytes of text")
    if tokenizer.vocab_size < vocab_size:
        typer.echo(f"(the text has too few repeated pairs for the {vocab_size:,} asked for)")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A tokenizer.json, or a run directory.")],
    text: Annotated[
        str | None, typer.Option(help="Show what becomes of this text.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell the size, the special and the longest tokens, and how a text is cut."""
    from cllm.text.facts import tokenizer_facts
    from cllm.text.tokenizer import Tokenizer

    path = file / "tokenizer.json" if file.is_dir() else file
    facts = tokenizer_facts(Tokenizer.load(path), text)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(facts), ensure_ascii=False))
        return
    typer.echo(
        f"{path}: {facts.vocab_size:,} tokens, {facts.merges:,} merges, sha256 {facts.sha256}"
    )
    typer.echo("special: " + ", ".join(f"{t} = {i}" for t, i in facts.special_tokens.items()))
    typer.echo(f"longest: {', '.join(facts.longest)}")
    typer.echo(f"mean length: {facts.mean_bytes:.2f} bytes")
    if facts.pieces is not None:
        typer.echo(
            f"text: {facts.text_bytes:,} bytes, {facts.text_tokens:,} tokens, "
            f"{facts.bytes_per_token:.2f} bytes per token"
        )
        cut = (facts.text_tokens or 0) - len(facts.pieces)
        typer.echo("tokens: " + " ".join(facts.pieces) + (f" … {cut:,} more" if cut > 0 else ""))
