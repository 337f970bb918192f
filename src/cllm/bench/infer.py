"""``cllm bench infer``: writing and reading tokens, beside transformers with the same weights.

llama.cpp and ONNX Runtime take part where their packages and our exports to their formats are there.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from cllm.bench.harness import Claim, Contestant, Options, Result, contest, interleaved, load_now
from cllm.bench.reference import reference_run
from cllm.core.config import Config
from cllm.core.cpu import is_busy
from cllm.core.settings import merge
from cllm.core.threads import spin_briefly

TAKES = frozenset({"minutes"})
ROUNDS, STARTS = 5, 5
FIGURES = ("decode 1", "decode 32", "prefill")
MODULE = "cllm.bench.infer_contestant"
NAMES = {
    "compiled": "cllm, compiled step",
    "eager": "cllm, eager",
    "transformers": "transformers, eager",
    "transformers-static": "transformers, static cache, compiled",
}
NOTES = [
    "Tokens a second, fp32, greedy; medians of rounds in turns, a process for each contestant, the first"
    " call apart. decode: a whole call, 16 tokens read and 100 written after each prompt, with 1 and"
    " with 32 prompts. prefill: one pass over the model's whole context, 128 tokens for the demo and 256"
    " for small, so no 512 are read at once. The models have the presets' shapes and few steps of"
    " training: speed does not depend on the weights.",
    "Start to first token: `cllm generate RUN --max-tokens 1` as a process, with a compiled step, to the"
    " end of the process; its peak resident set beside it.",
]


def run(options: Options) -> Result:
    """The demo's model and the 15 M-parameter one; ``quick``: a smaller one, uncompiled, one round."""
    load, busy = load_now(), is_busy()
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    notes, rows, claims = list(NOTES), list[dict[str, Any]](), list[Claim]()
    for preset in ("nano",) if options.quick else ("tiny", "small"):
        if rows and deadline is not None and time.monotonic() > deadline:
            notes.append(f"{preset}: not begun, since --minutes were over.")
            continue
        path = reference_run(model_config(preset)).path
        figures = measured(path, options.quick, notes)
        rows += [
            {"model": preset, "who": NAMES[who]} | {name: one[name] for name in one}
            for who, one in figures.items()
        ]
        if preset != "small":
            claims += speed_claims(figures)
            claims += start_claims(path, options.quick)
    why = busy or ("--quick" if options.quick else "")
    if why:
        claims = [
            Claim(
                name=c.name,
                value=c.value,
                required=c.required,
                aim=c.aim,
                higher_is_better=c.higher_is_better,
                judged=False,
                why=c.why or why,
            )
            for c in claims
        ]
    return Result(
        bench="infer",
        rows=rows,
        claims=claims,
        notes=notes,
        packages=("torch", "transformers", "llama-cpp-python", "onnxruntime"),
        load_before=load,
        busy=busy or "",
    )


def model_config(preset: str) -> Config:
    """A few steps of training at a preset's shape, on the built-in corpus."""
    changes: dict[str, Any] = {"model.preset": preset, "train.steps": 2, "train.batch_size": 2}
    changes |= {"train.compile": "off", "train.dtype": "fp32", "model.embedding.init": "normal"}
    changes |= {"data.test": 0.0, "data.validation": 0.01}
    changes |= {"log.tensorboard": False, "log.sample_tokens": 1}
    if preset == "nano":
        changes["tokenizer.vocab_size"] = 300
    return merge(Config(), changes)


def measured(path: Path, quick: bool, notes: list[str]) -> dict[str, dict[str, float]]:
    """Medians of each contestant: tokens a second by figure, and seconds to be ready."""
    wanted = ["eager"] if quick else ["compiled", "eager"]
    if importlib.util.find_spec("transformers") is None:
        notes.append("transformers is not installed (pip install 'cllm[bench]'): no comparison.")
    else:
        wanted += ["transformers"] if quick else ["transformers", "transformers-static"]
    env = dict(os.environ)
    spin_briefly(env)
    new = "8" if quick else "100"
    starts = [
        lambda who=who: Contestant(who, MODULE, [who, str(path), "--new", new], env)
        for who in wanted
    ]
    with contest(starts) as contestants:
        rounds = interleaved(contestants, 1 if quick else ROUNDS)
        ready = {c.name: c.ready["start_seconds"] for c in contestants}
    return {
        who: {name: median(r[name] for r in found) for name in FIGURES}
        | {"ready (s)": ready[who], "peak RSS (MiB)": max(r["peak_rss"] for r in found) / 2**20}
        for who, found in rounds.items()
    }


def speed_claims(figures: dict[str, dict[str, float]]) -> list[Claim]:
    """Ours against each peer, as far as there are figures of both."""
    us = figures.get("compiled") or figures["eager"]

    def ratio(peer: str, name: str) -> float | None:
        return us[name] / figures[peer][name] if peer in figures else None

    missing = "not measured: cllm bench infer has no llama.cpp contestant yet"
    return [
        Claim(
            name="demo, batch 1: × transformers eager",
            value=ratio("transformers", "decode 1"),
            required=5.0,
            why="" if "transformers" in figures else "transformers is not installed",
        ),
        Claim(
            name="demo, batch 1: × llama.cpp",
            value=ratio("llama.cpp", "decode 1"),
            required=1.0,
            aim=2.0,
            why=missing,
        ),
        Claim(
            name="demo, batch 32: × llama.cpp",
            value=ratio("llama.cpp", "decode 32"),
            required=3.0,
            aim=5.0,
            why=missing,
        ),
    ]


def start_claims(path: Path, quick: bool) -> list[Claim]:
    """A process of ``cllm generate`` from its start to its first token, and its memory."""
    seconds, peak = [], 0.0
    code = (
        "import sys\nfrom cllm.cli import main\n"
        f"sys.argv = ['cllm', 'generate', {str(path)!r}, '--max-tokens', '1', '--prompt', 'The']\n"
        "main.__globals__['app'](standalone_mode=False)\n"
        "from cllm.core.memory import peak_rss\nprint(peak_rss(), file=sys.stderr)\n"
    )
    with tempfile.TemporaryDirectory() as place:
        for _ in range(1 if quick else STARTS):
            begin = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=place
            )
            seconds.append(time.perf_counter() - begin)
            peak = max(peak, float(done.stderr.splitlines()[-1]) / 2**20)
    return [
        Claim(
            name="cllm generate: start to first token (s)",
            value=median(seconds),
            required=3.0,
            higher_is_better=False,
        ),
        Claim(
            name="cllm generate: peak RSS (MiB)",
            value=peak,
            required=400 * 1e6 / 2**20,
            higher_is_better=False,
        ),
    ]
