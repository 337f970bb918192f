"""``cllm eval`` and ``cllm generate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cllm.cli.terminal import printable

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


def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; higher is more surprising.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0 is off.")] = 50,
    top_p: Annotated[
        float, typer.Option(help="Draw from the fewest that reach this probability; 1 is off.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
) -> None:
    """Let a model write on from a prompt."""
    from cllm.core.threads import spin_briefly

    spin_briefly()  # before torch is loaded

    from cllm.api import load
    from cllm.infer.sampling import Sampling

    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    pieces = load(run).stream(prompt, sampling)
    first = next(pieces, "")  # what is wrong shows before the prompt is echoed
    typer.echo(printable(prompt + first), nl=False)
    for piece in pieces:
        typer.echo(printable(piece), nl=False)
    typer.echo("")
