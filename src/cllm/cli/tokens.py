"""``cllm tokens``: look into the tokens of a run or a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cllm.cli import tokens_nearest
from cllm.core.errors import UserError, value_errors_as

if TYPE_CHECKING:
    from rich.tree import Tree

    from cllm.text.token_lookup import TokenLookup

app = typer.Typer(
    no_args_is_help=True, help="Look into tokens: their codes, roots and nearest tokens."
)
app.command("nearest")(tokens_nearest.nearest)

Place = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run directory, a .cllm file, or any BPE tokenizer.json."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def show(
    run: Place,
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="A token as text, or its id as '#123'.")
    ],
    as_json: AsJson = False,
) -> None:
    """Factor a token: its pieces and primes, its root and variants, what it was merged from."""
    with value_errors_as(UserError):
        lookup = _open(run)
        facts = _facts(lookup, lookup.token(token))
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    _say(lookup.note)
    _print_token(lookup, facts)


@app.command()
def similar(
    run: Place,
    word: Annotated[str, typer.Argument(metavar="WORD", help="A word, or a token's id as '#123'.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many of each to list.")] = 10,
    as_json: AsJson = False,
) -> None:
    """List the tokens nearest by their codes (log gcd / log lcm) beside the nearest by the run's
    learned embedding (cosine)."""
    with value_errors_as(UserError):
        lookup = _open(run)
        token, line = lookup.word(word)
        ids, scores = lookup.codes.similar([token], k)
        near = [(i, s) for i, s in zip(ids[0].tolist(), scores[0].tolist(), strict=True) if s > 0]
        learned, why = _learned(run, token, k, len(lookup.tree))
    if as_json:
        found: dict[str, Any] = {"word": word, **_name(lookup, token), "note": line}
        found["by_codes"] = [
            {**_name(lookup, i), "similarity": s, "root": _root(lookup, token, i)} for i, s in near
        ]
        found["by_embedding"] = learned and [{**_name(lookup, i), "cosine": c} for i, c in learned]
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    _say(lookup.note, line, why)
    _print_neighbours(lookup, token, near, learned)


def _open(path: Path) -> TokenLookup:
    from cllm.store.run import RunDirectory
    from cllm.text.token_lookup import TokenLookup

    if _is_model(path):
        from cllm.api import load

        return TokenLookup.of_tokenizer(load(path).tokenizer)
    if path.is_file():
        return TokenLookup.of_file(path)
    run = RunDirectory.open(path)
    return TokenLookup.of_run(run.tokenizer, run.data)


def _is_model(path: Path) -> bool:
    """Whether it is a compressed model in one file, without torch, which takes a second to load."""
    return path.suffix == ".cllm" and path.is_file()


def _learned(
    path: Path, token: int, k: int, known: int
) -> tuple[list[tuple[int, float]] | None, str]:
    """Neighbours by the learned table among its first ``known`` rows, those of tokens, or ``None`` and why
    there are none."""
    if path.is_file() and not _is_model(path):
        return None, "no learned embedding: this is a tokenizer, not a run"
    from cllm.core.threads import spin_briefly

    spin_briefly()  # before torch is loaded

    from cllm.api import load
    from cllm.infer.nearest import nearest_by_cosine

    try:
        model = load(path).model
        ids, cosines = nearest_by_cosine(model.embedding.table()[:known], token, k)
    except (UserError, ValueError) as error:
        return None, f"no learned embedding: {error}"
    return list(zip(ids, cosines, strict=True)), ""


def _facts(lookup: TokenLookup, token: int) -> dict[str, Any]:
    """What ``show`` tells, as JSON values."""
    from cllm.lattice.similarity import bits

    codes, root = lookup.codes, lookup.codes.root([token])
    return {
        **_name(lookup, token),
        "count": None if codes.counts is None else int(codes.counts[token]),
        "bits": float(bits(codes.codes.take([token]))[0]),
        "factors": [
            {"prime": prime, "exponent": exponent, "piece": codes.describe(piece)}
            for piece, prime, exponent in codes.factors(token)
        ],
        "root": None if root is None else codes.describe(root),
        "variants": [_name(lookup, i) for i in lookup.variants(token)],
        "relatives": [_name(lookup, i) for i in lookup.relatives(token)],
        "merged_from": [_name(lookup, i) for i in lookup.tree.parts[token].tolist() if i >= 0],
    }


def _name(lookup: TokenLookup, token: int) -> dict[str, Any]:
    return {
        "id": token,
        "text": lookup.tree.text(token),
        "bytes": lookup.tree.texts[token].hex(" "),
    }


def _root(lookup: TokenLookup, one: int, other: int) -> str | None:
    root = lookup.codes.root([one, other])
    return None if root is None else lookup.codes.describe(root)


def _print_token(lookup: TokenLookup, facts: dict[str, Any]) -> None:
    import math

    token = facts["id"]
    counts = lookup.codes.counts
    rows = [("token", lookup.name(token)), ("id", f"{token}"), ("bytes", facts["bytes"] or "none")]
    if counts is not None:
        rows.append(("count", f"{facts['count']:,} of {counts.sum():,} in the training split"))
    product = " · ".join(_power(f["prime"], f["exponent"]) for f in facts["factors"])
    rows += [("code", product), ("log₂ of it", f"{facts['bits']:.1f} bits")]
    rows.append(("root", facts["root"]))
    for what in ("variants", "relatives"):
        names = " ".join(lookup.name(other["id"]) for other in facts[what])
        rows.append((what, names or "none"))
    for title, text in rows:
        typer.echo(f"{title:<11} {text}")
    pieces: list[tuple[str, ...]] = [
        (
            _power(f["prime"], f["exponent"]),
            f"{f['exponent'] * math.log2(f['prime']):.1f}",
            f["piece"],
        )
        for f in facts["factors"]
    ]
    _print_table(("prime", "bits", "piece"), pieces, right=(0, 1))
    from rich.console import Console

    Console(markup=False, highlight=False).print(_branch(lookup, token))


def _power(prime: int, exponent: int) -> str:
    return f"{prime}" if exponent == 1 else f"{prime}^{exponent}"


def _branch(lookup: TokenLookup, token: int) -> Tree:
    """The merge tree below a token."""
    from rich.text import Text
    from rich.tree import Tree

    top = Tree(Text(f"{lookup.name(token)}  #{token}"))
    waiting = [(top, token)]
    while waiting:
        branch, here = waiting.pop()
        for part in lookup.tree.parts[here].tolist():
            if part >= 0:
                waiting.append((branch.add(Text(f"{lookup.name(part)}  #{part}")), part))
    return top


def _print_neighbours(
    lookup: TokenLookup,
    token: int,
    near: list[tuple[int, float]],
    learned: list[tuple[int, float]] | None,
) -> None:
    typer.echo(f"{lookup.name(token)}  #{token}")
    ours = [(lookup.name(i), f"{s:.3f}", _root(lookup, token, i) or "") for i, s in near]
    if not ours:
        typer.echo("No other token shares a piece with it.")
    titles: tuple[str, ...] = ("by code", "similarity", "shared root")
    rows: list[tuple[str, ...]] = list(ours)
    if learned is not None:
        theirs = [(lookup.name(i), f"{c:.3f}") for i, c in learned]
        titles += ("by embedding", "cosine")
        height = max(len(ours), len(theirs))
        ours += [("", "", "")] * (height - len(ours))
        theirs += [("", "")] * (height - len(theirs))
        rows = [(*a, *b) for a, b in zip(ours, theirs, strict=True)]
    if rows:
        _print_table(titles, rows, right=(1, 4))


def _print_table(
    titles: tuple[str, ...], rows: list[tuple[str, ...]], right: tuple[int, ...]
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    # In a pipe nothing is cut to the width of a window that is not there.
    Console(width=None if console.is_terminal else 1_000, highlight=False).print(table)


def _say(*lines: str) -> None:
    """Notes go beside the output, so that it can be piped."""
    for line in lines:
        if line:
            typer.echo(f"({line})", err=True)
