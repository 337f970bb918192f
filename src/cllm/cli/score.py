"""``cllm score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm.cli.generate import Quiet, Weights
from cllm.cli.use import RunPath


def score(
    run: RunPath,
    texts: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.jsonl",
            help='One {"text": …} a line, or {"prompt": …, "completion": …}: the completion is scored.',
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE.jsonl", help="Where scores go; what is there is gone on with."),
    ],
    weights: Weights = "fp32",
    quiet: Quiet = False,
) -> None:
    """Score each text of a file: log-likelihood in nats, and bits per byte."""
    from cllm.core.threads import spin_briefly

    spin_briefly()  # before torch is loaded

    from cllm.api import load
    from cllm.infer.jsonl import score_file
    from cllm.training.progress import open_progress

    loaded, progress = load(run), open_progress(quiet=quiet)
    engine = loaded.engine(weights=weights, compiled=False, say=progress.say)
    with progress.stage("scoring", 1) as advance:
        done = score_file(engine, loaded.tokenizer, texts, out, advance)
    kept = f", {done.kept} of them kept from before" if done.kept else ""
    progress.say(f"{out}: {done.total} scores{kept}")
