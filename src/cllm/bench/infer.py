"""``cllm bench infer``: writing and reading tokens, beside transformers, llama.cpp and ONNX Runtime.

All have the same weights in float32; a peer whose package is not installed is left out, and a note says so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from cllm.bench.harness import Claim, Contestant, Options, Result, contest, interleaved, load_now
from cllm.bench.reference import reference_run
from cllm.core.atomic import remove
from cllm.core.config import Config
from cllm.core.cpu import is_busy
from cllm.core.settings import load_config, merge
from cllm.core.threads import spin_briefly
from cllm.store.run import RunDirectory

TAKES = frozenset({"minutes"})
ROUNDS, STARTS = 5, 5
FIGURES = ("decode 1", "decode 32", "prefill")
FIRST = "first (ms)"
MODULE, PEERS = "cllm.bench.infer_contestant", "cllm.bench.infer_peers"
PACKAGES = {
    "transformers": ("transformers", "cllm[bench]"),
    "transformers-static": ("transformers", "cllm[bench]"),
    "llama.cpp": ("llama_cpp", "cllm[llama]"),
    "onnxruntime": ("onnxruntime", "cllm[onnx]"),
}
"""The package that a peer needs, and the extra that brings it."""
EXPORTS = {"llama.cpp": "gguf", "onnxruntime": "onnx"}
NAMES = {
    "compiled": "cllm, compiled loop",
    "eager": "cllm, eager",
    "transformers": "transformers, eager",
    "transformers-static": "transformers, static cache, compiled",
    "llama.cpp": "llama.cpp, F32, F32 cache",
    "onnxruntime": "ONNX Runtime, our export with a cache",
}
NOTES = [
    "Tokens a second, float32, greedy; medians of rounds in turns, a process for each contestant, the first"
    " call apart (ready: seconds until all was loaded, compiled and called once). decode: a whole call, 16"
    " tokens read and 100 written after each prompt, with 1 and with 32 prompts. prefill: 512 tokens, as"
    " texts of the model's whole context (4 of 128 for the demo, 2 of 256 for small). first: milliseconds"
    " until 16 tokens are read and one is written, all being ready. The models have the"
    " presets' shapes and two steps of training: speed does not depend on the weights.",
    "llama.cpp by its batch interface, a sequence of its own for each prompt, cache in float32, logits of"
    " last tokens only; ONNX Runtime with keys and values kept in its own memory. Both have one thread or"
    " all, whichever was faster for a figure in the warm-up.",
    "Start to first token: `cllm generate RUN --max-tokens 1` as a process, with what `cllm compile` made,"
    " to the end of the process; its peak resident set beside it.",
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
        headline=[
            {"tokens/s of the demo's model": row["who"], "1 text": row["decode 1"]}
            | {"32 texts": row["decode 32"], "reading": row["prefill"]}
            for row in rows
            if row["model"] == "tiny"
        ],
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
    for who, (package, extra) in PACKAGES.items():
        if quick and who == "transformers-static":
            continue
        if importlib.util.find_spec(package) is None:
            notes.append(f"{NAMES[who]}: not installed (pip install '{extra}').")
        else:
            wanted.append(who)
    env = dict(os.environ)
    spin_briefly(env)
    new = 8 if quick else 100
    with contest([partial(contestant, who, path, new, env) for who in wanted]) as found:
        rounds = interleaved(found, 1 if quick else ROUNDS)
        ready = {c.name: c.ready for c in found}
    for who, facts in ready.items():
        if facts.get("threads"):
            chosen = ", ".join(f"{name} {n}" for name, n in facts["threads"].items())
            notes.append(f"{path.name}, {NAMES[who]}, threads: {chosen}.")
    return {
        who: {name: median(r[name] for r in figures) for name in FIGURES}
        | {
            FIRST: 1e3 * median(1 / r["first"] for r in figures),
            "ready (s)": ready[who]["start_seconds"],
            "peak RSS (MiB)": max(r["peak_rss"] for r in figures) / 2**20,
        }
        for who, figures in rounds.items()
    }


def contestant(who: str, path: Path, new: int, env: dict[str, str]) -> Contestant:
    """The process of one of ``NAMES``; peers with formats of their own run our export of the run."""
    if who not in EXPORTS:
        return Contestant(who, MODULE, [who, str(path), "--new", str(new)], env)
    model = load_config(RunDirectory.open(path).config).model
    facts = {"--vocab": model.vocab_size, "--context": model.context, "--new": new}
    options = [str(part) for pair in facts.items() for part in pair]
    return Contestant(who, PEERS, [who, str(exported(path, EXPORTS[who])), *options], env)


def exported(path: Path, to: str) -> Path:
    """The run in another program's format: kept beside it, made now if it is not there, or was made by
    another version of the exporters."""
    from cllm.export import export as exporter

    sources = sorted(Path(exporter.__file__).parent.glob("*.py"))
    version = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    folder, suffix = path / "export", ".gguf" if to == "gguf" else ""
    place = folder / f"bench-{to}-{version}{suffix}"
    if not place.exists():
        for older in folder.glob(f"bench-{to}*"):
            remove(older)
        exporter.export(path, to, out=place, checking=False)
    return place


def speed_claims(figures: dict[str, dict[str, float]]) -> list[Claim]:
    """Ours against each peer, as far as there are figures of both."""
    us = figures.get("compiled") or figures["eager"]

    def ratio(peer: str, name: str) -> float | None:
        return us[name] / figures[peer][name] if peer in figures else None

    def why(peer: str) -> str:
        return "" if peer in figures else f"{PACKAGES[peer][0]} is not installed"

    return [
        Claim(
            name="demo, batch 1: × transformers eager",
            value=ratio("transformers", "decode 1"),
            required=5.0,
            why=why("transformers"),
        ),
        Claim(
            name="demo, batch 1: × llama.cpp",
            value=ratio("llama.cpp", "decode 1"),
            required=1.0,
            aim=2.0,
            why=why("llama.cpp"),
        ),
        Claim(
            name="demo, batch 32: × llama.cpp",
            value=ratio("llama.cpp", "decode 32"),
            required=3.0,
            aim=5.0,
            why=why("llama.cpp"),
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
