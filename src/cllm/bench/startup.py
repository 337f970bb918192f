"""``cllm bench startup``: from the command to the first step, with a cold and a warm compile cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from cllm.bench.harness import Claim, Options, Result, load_now
from cllm.core.cpu import is_busy
from cllm.core.errors import UserError
from cllm.store.metrics import read_columns

HELPS, WARM = 7, 5
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
    ]
    required = (0.3, 60.0, 10.0)
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
        "The first step's own time is included. Medians; nothing cached: corpus, measurements, code."
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
