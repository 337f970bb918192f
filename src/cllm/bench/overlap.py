"""What a step waits for with ``train.overlap`` and without: a part of ``cllm bench parallel``.

A batch is handed over or made, a checkpoint is copied or written, a line of the log likewise. In between
the caller sleeps, as a step that leaves a core free would let the threads work.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cllm.bench.arena_contestant import VOCABULARY
from cllm.core.config import Config
from cllm.core.settings import merge, to_toml
from cllm.store.draft import Draft
from cllm.store.metrics import MetricsLog
from cllm.store.run import RunDirectory
from cllm.text.batches import BatchSource
from cllm.text.packed import PackedTokens
from cllm.training.background import Background
from cllm.training.board import NoBoard
from cllm.training.build import build
from cllm.training.choose import choose
from cllm.training.feed import Feed
from cllm.training.saving import Saver
from cllm.training.snapshot import Standing

TIMES = 9


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of milliseconds that a step waits, and notes; nothing here is claimed."""
    preset = "nano" if quick else "tiny"
    fixed: dict[str, Any] = {"model.preset": preset, "model.vocab_size": VOCABULARY}
    fixed |= {"train.compile": "off", "train.dtype": "fp32"}
    config = choose(merge(Config(), fixed)).config
    rows = []
    with tempfile.TemporaryDirectory(prefix="cllm-bench-") as folder:
        for threaded in (False, True):
            waits = _waits(config, Path(folder) / str(threaded), threaded, 2 if quick else TIMES)
            rows += [
                {
                    "contestant": f"{what}, {'beside the steps' if threaded else 'in the step'}",
                    "ms waited": round(1e3 * median(seconds), 3),
                }
                for what, seconds in waits.items()
            ]
    note = (
        "`ms waited`: what a step waits for a batch, a checkpoint and a line of the log, with "
        f"`train.overlap` (beside the steps) and without; medians of {TIMES}, on this machine's temporary "
        "files."
    )
    return rows, [note]


def _waits(config: Config, place: Path, threaded: bool, times: int) -> dict[str, list[float]]:
    """Seconds that each kind of work keeps its caller."""
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, 100_000)
    tokens[[0, -1]] = 0
    packed = PackedTokens.from_arrays(tokens, text_bytes=len(tokens))
    source = BatchSource(packed, config.model.context, config.train.batch_size, seed=0)
    _, step = build(config)
    with Draft(place) as draft:
        draft.run.write_config(to_toml(config))
        run: RunDirectory = draft.commit()
    feed, background = Feed(source, config.train, ahead=threaded), Background(threaded=threaded)
    with MetricsLog(run.metrics) as metrics:
        saver = Saver(
            config=config,
            run=run,
            step=step,
            metrics=metrics,
            board=NoBoard(),
            background=background,
        )
        found: dict[str, list[float]] = {"batch": [], "checkpoint": [], "line of the log": []}
        for number in range(times + 1):
            standing = Standing(step=number)
            calls: dict[str, Callable[[], object]] = {
                "batch": partial(feed, number),
                "checkpoint": partial(saver.save, standing, best=False),
                "line of the log": partial(
                    background.hand_over, metrics.write, number, "train", loss=1.0, bpb=1.0
                ),
            }
            for what, call in calls.items():
                begin = time.perf_counter()
                call()
                found[what].append(time.perf_counter() - begin)
                background.wait()
                time.sleep(0.02)
        feed.close()
        background.close()
    return {what: seconds[1:] for what, seconds in found.items()}
