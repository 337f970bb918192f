"""``cllm bench original``: the workload of the older C system, trained for real.

A table of 1,000 rows, a word-level tokenizer, d=128, 2 layers, 4 heads, feed-forward 512, batch 4×32,
9 batches an epoch, 100 epochs over 1,241 words, AdamW, one process. The C program took 407 s as
shipped and 242 s with -O3, and ended at a training loss of 6.25 that did not depend on its weights.

``--ladder`` runs the same work with each technique of the house alone and all together.
"""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cllm.bench.harness import Claim, Contestant, Options, Result, contest, interleaved, load_now
from cllm.core.cpu import is_busy, usable_threads
from cllm.core.errors import UserError
from cllm.core.threads import spin_briefly

WORDS, ROWS, BATCH, LENGTH, BATCHES, EPOCHS = 1241, 1000, 4, 32, 9, 100
C_SHIPPED, C_O3, C_LOSS = 407.0, 242.0, 6.25
ROUNDS = 5
ALONE = "--set train.compile=off --set train.dtype=fp32 --set train.threads=1"
ALONE += " --set train.attention=matmul"
"""One thread, eager, fp32: what a plain loop does."""
CREW = "--set train.parallel.workers=2"
LINE = "--set train.pipeline.mode=delayed"
BOTH = "--set train.attention=matmul --set train.compile=on"
RUNGS = {
    "plain loop (torch modules, fp32, one thread)": f"plain {ALONE}",
    "arena (flat step, eager, fp32)": f"ours {ALONE} --give-memory-back",
    "arena, freed memory kept": f"ours {ALONE}",
    "arena, two threads": f"ours {ALONE} --set train.threads=2",
    "arena, two workers": f"ours {ALONE} {CREW}",
    "arena, delayed pipeline of three threads": f"ours {ALONE} {LINE}",
    "arena, bf16": f"ours {ALONE} --set train.dtype=bf16",
    "compiled step, no vectors": f"ours {ALONE} --set train.compile=on --simdlen 1",
    "compiled step, 256-bit vectors": f"ours {ALONE} --set train.compile=on --simdlen 256",
    "compiled step, widest vectors": f"ours {ALONE} --set train.compile=on",
    "compiled step, bf16": f"ours {ALONE} --set train.compile=on --set train.dtype=bf16",
    "compiled step, two threads": f"ours {ALONE} --set train.compile=on --set train.threads=2",
    "compiled step, two workers": f"ours {ALONE} --set train.compile=on {CREW}",
    "compiled step, delayed pipeline": f"ours {ALONE} --set train.compile=on {LINE}",
    "all together": f"ours {BOTH}",
}
PROMISED = {
    "arena, two threads": "threads 4–8×",
    "compiled step, two threads": "threads 4–8×",
    "arena, two workers": "threads 4–8×",
    "compiled step, two workers": "threads 4–8×",
    "arena, delayed pipeline of three threads": "pipeline 2–3×",
    "compiled step, delayed pipeline": "pipeline 2–3×",
    "all together": "all: 0.3–5 ms for 100 epochs",
}
"""What the older system promised, multiplied on paper, for what is measured here."""
TAKES = frozenset({"data", "ladder"})
BEST = "all together"
PROMISES = (
    "`promised`: what the older system promised, multiplied on paper; it also promised 2–4× from "
    "reduction, which makes another model (docs/embeddings.md). Nothing here goes below the floor. The "
    "products' own libraries choose their vectors for themselves in all rows. The pipeline trains with a "
    "delay of two steps: it is the only rung whose result is another than the plain loop's by more than "
    "rounding."
)


def run(options: Options) -> Result:
    """Train the workload, ``ROUNDS`` times interleaved where there are several contestants."""
    text, where = _text(options.data)
    load, busy = load_now(), is_busy()
    rounds = 1 if options.quick else ROUNDS
    epochs = 2 if options.quick else EPOCHS
    calls = _rungs() if options.ladder else {BEST: RUNGS[BEST]}
    arguments = ["--words", text, "--epochs", str(epochs)]
    starts = [partial(_start, name, call, arguments) for name, call in calls.items()]
    with contest(starts) as contestants:
        figures = interleaved(contestants, rounds)
    first = median(r["seconds"] for r in figures[contestants[0].name])
    rows = [_row(c, figures[c.name], first if options.ladder else None) for c in contestants]
    ours = figures[BEST]
    seconds = median(r["seconds"] for r in ours)
    ready = next(c for c in contestants if c.name == BEST).ready
    flops = ready["flops_per_token"] * epochs * BATCHES * BATCH * LENGTH
    floor = flops / ready["matmul_peak"]
    notes = [
        f"Text: {where}. {epochs} epochs of {BATCHES} batches of {BATCH}×{LENGTH} words, "
        f"{ready['parameters']:,} parameters. Seconds are of training alone: compilation and one "
        "trained epoch, undone, come before.",
        f"Floor: {flops:.2g} floating-point operations at this machine's matmul rate "
        f"({ready['matmul_peak'] / 1e9:,.0f} GFLOP/s, its best precision) are {floor:.2f} s.",
        f"The C program: {C_SHIPPED:.0f} s as shipped, {C_O3:.0f} s with -O3, loss {C_LOSS}.",
    ]
    if options.ladder:
        notes.append(PROMISES)
    judged = not busy and not options.quick
    why = busy or ("--quick" if options.quick else "")
    claims = [
        Claim(
            name="training seconds",
            value=round(seconds, 3),
            required=2.5,
            aim=1.0,
            higher_is_better=False,
            why=why,
            judged=judged,
        ),
        Claim(
            name="final training loss",
            value=round(median(r["loss"] for r in ours), 3),
            required=2.0,
            higher_is_better=False,
            why=why,
            judged=not options.quick,
        ),
        Claim(
            name="times as fast as the C program with -O3",
            value=round(C_O3 / seconds, 1),
            required=None,
            why="another machine's figure",
        ),
    ]
    return Result(
        bench="original-ladder" if options.ladder else "original",
        rows=rows,
        claims=claims,
        notes=notes,
        load_before=load,
        busy=busy or "",
        headline=[
            {"the older system's workload": who, "training, s": seconds, "final loss": loss}
            for who, seconds, loss in (
                ("C program, as shipped (told, another machine)", C_SHIPPED, C_LOSS),
                ("C program, -O3 (told, another machine)", C_O3, C_LOSS),
                ("cllm", round(seconds, 2), round(median(r["loss"] for r in ours), 3)),
            )
        ],
    )


def _rungs() -> dict[str, str]:
    """The rungs that this machine can take."""
    alone = usable_threads() < 2 or not hasattr(os, "memfd_create")
    return {name: call for name, call in RUNGS.items() if not (alone and CREW in call)}


def word_ids(words: list[str], rows: int = ROWS) -> np.ndarray:
    """A word-level tokenizer: ids by first appearance; words past the last row share it."""
    ids: dict[str, int] = {}
    return np.array([min(ids.setdefault(word, len(ids)), rows - 1) for word in words])


def read_words(path: str) -> list[str]:
    """The first 1,241 words of a file, in lower case, without punctuation."""
    try:
        return _words(Path(path).read_text(encoding="utf-8"))[:WORDS]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as text: {error}") from error


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'’-]+", text.lower())


def _text(data: tuple[str, ...]) -> tuple[str, str]:
    """The words' file, and what to call it."""
    if data:
        count = len(read_words(data[0]))
        if count < LENGTH * 2:
            raise UserError(f"{data[0]} has {count} words; at least {LENGTH * 2} are needed")
        return data[0], f"{Path(data[0]).name}, {count:,} words"
    from cllm.core.atomic import clear_errors
    from cllm.core.machine import cache_dir
    from cllm.text.builtin import language_reference

    path = cache_dir() / "bench" / "original.txt"
    words: list[str] = []
    for _, text in language_reference():
        words += _words(text)
        if len(words) >= WORDS:
            break
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(words[:WORDS]), encoding="utf-8")
    return str(path), f"the first {WORDS:,} words of the built-in corpus"


def _start(name: str, call: str, arguments: list[str]) -> Contestant:
    env = dict(os.environ)
    spin_briefly(env)
    if sys.stderr.isatty():
        print(f"\r\033[Kstarting {name}", end="", file=sys.stderr, flush=True)
    return Contestant(name, "cllm.bench.original_contestant", [*call.split(), *arguments], env)


def _row(
    contestant: Contestant, figures: list[dict[str, Any]], first: float | None
) -> dict[str, Any]:
    seconds = [r["seconds"] for r in figures]
    row = {
        "contestant": contestant.name,
        "training, s": round(median(seconds), 2),
        "lowest–highest": f"{min(seconds):.2f}–{max(seconds):.2f}",
        "ms a step": round(1000 * median(seconds) / figures[0]["steps"], 2),
        "final loss": round(median(r["loss"] for r in figures), 2),
        "compiling, s": round(contestant.ready["start_seconds"], 1),
    }
    if first is not None:
        row["× plain loop"] = round(first / median(seconds), 2)
        row["promised"] = PROMISED.get(contestant.name, "–")
    return row
