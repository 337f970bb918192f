"""``cllm bench startup``: from the command to the first step, with a cold and a warm compile cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from cllm.bench.harness import Claim, Options, Result, load_now
from cllm.core.cpu import is_busy
from cllm.core.errors import UserError
from cllm.store.metrics import read_columns

HELPS, WARM, STARTS = 7, 5, 3
SPLICED, PIECE = 10_000_000, 8
"""Tokens of the text on which the corpus start is timed, and of the pieces it is made of."""
COMMAND = [sys.executable, "-m", "cllm"]


def run(options: Options) -> Result:
    """Measure ``cllm --help`` and ``cllm train`` of the demo's model on the built-in corpus."""
    load, busy = load_now(), is_busy()
    helps = [_seconds_of_help() for _ in range(1 if options.quick else HELPS)]
    compiling = "off" if options.quick else "on"
    with tempfile.TemporaryDirectory() as place:
        cold = _seconds_to_first_step(Path(place), 0, compiling)
        count = 1 if options.quick else WARM
        warm = [_seconds_to_first_step(Path(place), n + 1, compiling) for n in range(count)]
    tokens, count = (20_000, 1) if options.quick else (SPLICED, STARTS)
    starts = _seconds_of_corpus_start(tokens, count)
    why = busy or ("--quick" if options.quick else "")
    rows: list[dict[str, Any]] = [
        {"what": "cllm --help", "seconds": round(median(helps), 2), "runs": len(helps)},
        {
            "what": "cllm train to its first step, nothing cached",
            "seconds": round(cold, 1),
            "runs": 1,
        },
        {
            "what": "cllm train to its first step, warm cache",
            "seconds": round(median(warm), 1),
            "runs": len(warm),
        },
        {
            "what": f"the corpus start, {tokens:,} tokens",
            "seconds": round(median(starts), 1),
            "runs": len(starts),
        },
    ]
    required = (0.3, 60.0, 10.0, 10.0)
    claims = [
        Claim(
            name=row["what"],
            value=row["seconds"],
            required=most,
            higher_is_better=False,
            why=why,
            judged=not why,
        )
        for row, most in zip(rows, required, strict=True)
    ]
    notes = [
        "The first step's own time is included. Medians; nothing cached: corpus, measurements, code.",
        "The corpus start is that of the demo's model (4,096 tokens, width 128), counts, tables and last"
        f" layer, on one thread; its text is made of pieces of {PIECE} tokens of the built-in one.",
    ]
    return Result(
        bench="startup", rows=rows, claims=claims, notes=notes, load_before=load, busy=busy or ""
    )


def _seconds_of_help() -> float:
    begin = time.perf_counter()
    subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)
    return time.perf_counter() - begin


def _seconds_to_first_step(place: Path, number: int, compiling: str) -> float:
    """Start training in ``place`` (with its own cache) and wait for the first line of its metrics."""
    out = place / f"run{number}"
    settings = [f"train.compile={compiling}", "log.every=1", "log.tensorboard=false"]
    arguments = [part for text in settings for part in ("--set", text)]
    env = os.environ | {"CLLM_CACHE": str(place / "cache")}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*COMMAND, "train", "--quiet", "--out", str(out), *arguments],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None:
            metrics = out / "metrics.jsonl"
            if metrics.is_file() and read_columns(metrics, "train"):
                return time.perf_counter() - begin
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    raise UserError(f"cllm train ended with {process.returncode} before its first step")


def _seconds_of_corpus_start(tokens: int, count: int) -> list[float]:
    """Start the demo's model from a long text, ``count`` times.

    The built-in text is too short; spliced from it at random places, a text has as many kinds of pairs
    as a long one has.
    """
    import numpy as np

    from cllm.bench.layout import one_thread
    from cllm.core.config import Config
    from cllm.model.transformer import Transformer
    from cllm.text.corpus import prepare
    from cllm.text.packed import PackedTokens
    from cllm.training.progress import Silent
    from cllm.training.start_tables import start_tables

    config, seconds = Config(), []
    with tempfile.TemporaryDirectory() as place:
        dataset = prepare(config.data, config.tokenizer, Path(place), seed=0, context=128)
        ids = np.asarray(dataset.train.ids)
        begins = np.random.default_rng(0).integers(0, len(ids) - PIECE, tokens // PIECE)
        spliced = ids[begins[:, None] + np.arange(PIECE)].ravel()
        ended = np.concatenate([ids[:1], spliced, ids[:1]])
        long = replace(dataset, train=PackedTokens.from_arrays(ended, text_bytes=len(spliced)))
        config = config.replace(model__vocab_size=dataset.tokenizer.vocab_size)
        model = Transformer(config.model)
        with one_thread():
            for _ in range(count):
                model.start(0)
                begin = time.perf_counter()
                start_tables(config, long, model, Silent())
                seconds.append(time.perf_counter() - begin)
    return seconds
