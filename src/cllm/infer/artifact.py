"""The decode step compiled ahead of time, kept beside its run (AOTInductor).

One file for each combination of weights, options, torch version, processor and threads, which make its
name: another torch or processor looks for another name, so that a stale file is never used. Compiled code
is a library that runs in our process. Therefore only those are loaded whose checksum this user's cache
directory knows: a run from elsewhere brings none along that would be run.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cllm.core.atomic import clear_errors, new_file, temporary_beside, write_json
from cllm.core.errors import UserError
from cllm.core.machine import cache_dir, cannot_compile
from cllm.core.measurements import machine_facts
from cllm.infer.engine import Decode, Engine
from cllm.infer.weights import NOT_COMPILED

FORMAT = 2
"""Raised when what is compiled changes, so that files made before are not used."""
TRIALS = 50
"""Steps of which each way to compile is timed."""
SETTINGS: dict[str, Any] = {
    # The graph's own checks of token and position cost more than the look-ups that they guard.
    "assert_indirect_indexing": False,
}


def artifact_path(engine: Engine, directory: Path) -> Path:
    """Where the compiled step of ``engine`` lies, or would lie, in ``directory``."""
    options = engine.options
    facts = {
        "format": FORMAT,
        "machine": machine_facts(torch.get_num_threads()),
        "slots": options.slots,
        "capacity": engine.capacity,
        "weights": options.weights,
        "cache": options.cache,
        "model": engine.fingerprint(),
        "scored": not isinstance(engine.network.head, torch.nn.Identity),
    }
    if engine.network.integers:  # the same numbers in other kernels
        facts["integers"] = engine.network.integers
    if engine.tokens != engine.network.config.vocab_size:
        facts["tokens"] = engine.tokens
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return directory / f"decode-{options.slots}x{engine.capacity}-{options.weights}-{key}.pt2"


def compile_decode(engine: Engine, directory: Path) -> Path:
    """Compile the decode step of ``engine`` into ``directory``; takes from half a minute to some minutes.

    It is compiled for one thread and for all of them, and what was measured to be faster is kept.
    Raises ``UserError`` where nothing can be compiled (no C++ compiler, a GPU, int8-dynamic weights).
    """
    obstacle = cannot_compile() or NOT_COMPILED.get(engine.options.weights)
    if engine.device.type != "cpu":
        obstacle = f"the step is compiled for CPUs, and the model is on {engine.device}"
    if obstacle:
        raise UserError(f"the decode step cannot be compiled: {obstacle}")
    path = artifact_path(engine, directory)
    with clear_errors(directory):
        directory.mkdir(exist_ok=True)
    slots = engine.options.slots
    example = (
        torch.zeros(slots, dtype=torch.long),
        torch.arange(slots) % engine.capacity,
        *(buffer.clone() for buffer in engine.cache.buffers),
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations, in its own calls
        program = torch.export.export(engine.network, example)
    # A team of threads waits for its slowest after every loop: small models are faster without one.
    bodies = [_compiled(program, path, n) for n in sorted({1, torch.get_num_threads()})]
    body = (
        bodies[0]
        if len(bodies) == 1
        else min(bodies, key=lambda b: _step_seconds(b, path, example))
    )
    with new_file(path) as file:
        file.write(body)
    note = _note(path)
    with clear_errors(note):
        note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, {"sha256": hashlib.sha256(body).hexdigest()})
    return path


def _compiled(program: torch.export.ExportedProgram, path: Path, threads: int) -> bytes:
    """The library of a step that runs on so many threads."""
    package = temporary_beside(path).with_suffix(".pt2")  # the compiler insists on the suffix
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(package),
                inductor_configs=SETTINGS | {"cpp.threads": threads},
            )
        return package.read_bytes()
    finally:
        package.unlink(missing_ok=True)


def _step_seconds(body: bytes, path: Path, given: tuple[Tensor, ...]) -> float:
    """The median time of a step of a compiled library."""
    package = temporary_beside(path).with_suffix(".pt2")
    try:
        package.write_bytes(body)
        step, times = _runner(package), []
        with torch.no_grad():
            for _ in range(TRIALS):
                begin = time.perf_counter()
                step(list(given))
                times.append(time.perf_counter() - begin)
        return median(times)
    finally:
        package.unlink(missing_ok=True)


def load_decode(engine: Engine, directory: Path) -> tuple[Decode | None, str]:
    """The compiled step for ``engine``, if there is one for it, and one line that tells what is used, or
    why not what is there; empty where nothing is."""
    path = artifact_path(engine, directory)
    if not path.is_file():
        others = list(directory.glob("decode-*.pt2")) if directory.is_dir() else []
        if not others:
            return None, ""
        return None, (
            "the compiled steps of this run are for other weights, options, threads, processor or torch: "
            "not used; `cllm compile` makes one"
        )
    try:
        known = json.loads(_note(path).read_text(encoding="utf-8"))["sha256"]
        made_here = known == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        made_here = False
    if not made_here:
        return None, f"{path.name} was not compiled by you on this machine, or is damaged: not used"
    try:
        return _runner(path), f"compiled step {path.name}"
    except (RuntimeError, AttributeError) as error:
        line = " ".join(str(error).split())[:200]
        return None, f"{path.name} cannot be loaded ({line}): not used"


def _runner(path: Path) -> Decode:
    # Not by torch._inductor, whose import alone takes a second and 150 MB.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)

    def decode(given: list[Tensor]) -> Sequence[Tensor]:
        made: Sequence[Tensor] = loader.run(given)
        return made

    return decode


def _note(path: Path) -> Path:
    """Where this user's cache keeps the checksum of a file that was compiled here."""
    return cache_dir() / "compiled" / f"{path.stem}.json"
