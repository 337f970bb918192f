"""A very small training step over random tokens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import cllm
from cllm.api import Run
from cllm.core.config import Config, TrainConfig
from cllm.core.model_config import ModelConfig
from cllm.model.cross_entropy import IGNORE
from cllm.model.transformer import Transformer
from cllm.store import checkpoint
from cllm.store.metrics import read_lines
from cllm.training.arena import Arena
from cllm.training.candidates import Sampler, unigram
from cllm.training.draws import Draws
from cllm.training.feed import MicroBatches
from cllm.training.lazy_rows import idling_tables
from cllm.training.neighbours import Neighbours
from cllm.training.optimizer import OPTIMIZERS
from cllm.training.reduce import reduce_run
from cllm.training.similarity import PairSource
from cllm.training.step import TrainStep

PIECES = 31
"""Pieces of a composed table in tests; each of the 23 tokens has three."""
SHAPE = {
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "d_ff": 24,
    "context": 8,
    "vocab_size": 23,
}


@pytest.fixture
def reduced(isolated: Path, told: Any) -> Callable[..., Run]:
    """Reduces a run into the directory ``name``."""

    def run(path: Path, name: str = "reduced", **options: Any) -> Run:
        return cllm.load(reduce_run(path, told, out=isolated / name, **options).run.path)

    return run


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One thread: what is this small gains nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def step_of(incidence_of: Callable[[int, int], Any]) -> Callable[..., TrainStep]:
    """Makes an eager step: fields of the model by their names, of training as ``train={…}``."""

    def make(
        *,
        train: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float64,
        master: torch.dtype | None = None,
        attention: str = "matmul",
        chunk: int = 0,
        compiled: bool = False,
        draws: Draws | None = None,
        **fields: Any,
    ) -> TrainStep:
        """``dtype``: of the arithmetic; ``master``: of the weights (float64 or float32)."""
        config = TrainConfig(**train or {})
        model = Transformer(ModelConfig(**SHAPE | fields), attention)
        if model.config.embedding.is_composed:
            model.set_incidence(incidence_of(SHAPE["vocab_size"], PIECES))
        model.start(5)
        default = torch.float64 if dtype == torch.float64 else torch.float32
        model.to(master or default)
        by_rows = idling_tables(config, model.config.tie_embeddings)
        arena = Arena.adopt(model, dtype, OPTIMIZERS[config.optimizer].moments, by_rows)
        return TrainStep(model.train(), arena, config, chunk=chunk, compiled=compiled, draws=draws)

    return make


@pytest.fixture(scope="session")
def batches_of() -> Callable[..., MicroBatches]:
    """Makes (count) micro-batches of (size) windows of random tokens, some targets masked."""

    def make(
        count: int = 1, size: int = 2, *, seed: int = 1, masked: float = 0.0, length: int = 8
    ) -> MicroBatches:
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for number in range(count):
            ids = torch.randint(0, 23, (size, length + 1), generator=generator)
            targets = ids[:, 1:].clone()
            # Unevenly: the first micro-batch loses few targets, the last one most.
            share = masked * (number + 1) / count
            targets[torch.rand(size, length, generator=generator) < share] = IGNORE
            batches.append((ids[:, :-1].contiguous(), targets))
        return batches

    return make


GRAPH = "the model's graph"


def _in_graph(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, marked for the profiler."""

    def marked(*arguments: Any) -> Any:
        with record_function(GRAPH):
            return call(*arguments)

    return marked


def _allocations(step: TrainStep, batches: Callable[[int], MicroBatches]) -> tuple[int, int]:
    """See the fixture."""
    for name in ("_only", "_part"):
        setattr(step, name, _in_graph(getattr(step, name)))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        for number in range(2):
            some = batches(number + 1)
            assert step(some, 1e-3).applied
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    graphs = [(e.start_ns(), e.end_ns()) for e in events if e.name() == GRAPH]
    assert len(graphs) == 2 * len(some)
    taken = [e.start_ns() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    inside = sum(any(begin <= at <= end for begin, end in graphs) for at in taken)
    return len(taken) - inside, inside


@pytest.fixture(scope="session")
def allocations() -> Callable[..., tuple[int, int]]:
    """How often memory was allocated in two steps on given batches: outside of forward and backward, and
    in them."""
    return _allocations


@pytest.fixture(scope="session")
def neighbours() -> Neighbours:
    """Four neighbours for each of the 23 tokens but the last, which has none."""
    rng = np.random.default_rng(4)
    ids = np.stack([rng.choice(np.delete(np.arange(23), i), 4, replace=False) for i in range(23)])
    found = -np.sort(-rng.uniform(0.1, 0.9, (23, 4)), axis=1)
    found[-1] = 0.0
    return Neighbours(ids, found)


@pytest.fixture(scope="session")
def draws_of(neighbours: Neighbours) -> Callable[..., Draws]:
    """Makes what a step draws from: ``candidates`` of the 23 tokens, ``pairs`` of them; 0 for none."""

    def make(candidates: int = 0, pairs: int = 0, divisor: bool = False, seed: int = 3) -> Draws:
        sampler = None
        if candidates:
            chances = unigram(np.arange(23))
            known = (neighbours, 0.5) if divisor else (None, 0.0)
            sampler = Sampler(candidates, chances, seed, *known)
        return Draws(sampler, PairSource(neighbours, pairs, seed) if pairs else None)

    return make


@pytest.fixture(scope="session")
def config_of(fast: dict[str, Any]) -> Callable[..., Config]:
    """Makes the fast configuration with dotted keys (``train__lr=…``) changed."""
    from cllm.core.settings import build

    def make(**changes: Any) -> Config:
        return build(fast | {key.replace("__", "."): value for key, value in changes.items()})

    return make


@pytest.fixture(scope="session")
def state_of() -> Callable[[Path], dict[str, Any]]:
    """All of a run that must be the same bits after a kill as without one."""
    return _state


@pytest.fixture(scope="session")
def assert_same_state() -> Callable[[Any, Any], None]:
    """Asserts that two trees are equal, tensors to the bit."""
    return _assert_same


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[[Path, Path], None]:
    """Asserts that two runs ended in the same bits."""

    def check(run: Path, straight: Path) -> None:
        _assert_same(_state(run), _state(straight))

    return check


def _state(run: Path) -> dict[str, Any]:
    """All that must be the same bits after a kill as without one."""
    saved = checkpoint.load(run)
    standing = {k: v for k, v in saved.state["standing"].items() if k != "train_seconds"}
    lines = [
        {k: v for k, v in line.items() if k != "time"} for line in read_lines(run / "metrics.jsonl")
    ]
    return {
        "step": saved.step,
        # Copies: what safetensors loads is the file itself, mapped, which a test may damage.
        "weights": {name: tensor.clone() for name, tensor in saved.weights.items()},
        "moments": saved.optimizer["moments"],
        "counters": saved.optimizer["counters"],
        "standing": standing,
        "best": checkpoint.load(run, "best").weights,
        "lines": lines,
        "config": (run / "run.toml").read_text(encoding="utf-8"),
    }


def _assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal trees; tensors to the bit."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            _assert_same(one[key], other[key], f"{where}.{key}")
    else:
        assert one == other, where


def _ranks(agent: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the processes that a torchrun has started, by rank."""
    found = {}
    text = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text()
    for pid in map(int, text.split()):
        with suppress(OSError):
            for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if pair.startswith(b"RANK="):
                    found[int(pair[5:])] = pid
    return found


@pytest.fixture(scope="session")
def ranks() -> Callable[[subprocess.Popen[str]], dict[int, int]]:
    """``_ranks``."""
    return _ranks


@pytest.fixture
def torchrun(cache: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``torchrun OPTIONS… ARGUMENTS…``; all that it started ends with the test."""
    started: list[subprocess.Popen[str]] = []
    mine = {"CLLM_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment = {k: v for k, v in os.environ.items() if k != "CLLM_DEBUG"} | mine

    def start(
        processes: int, *arguments: object, options: tuple[str, ...] = ("--standalone",), **how: Any
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", *options]
        command += ["--nproc-per-node", str(processes), *map(str, arguments)]
        child = subprocess.Popen(
            [*how.pop("before", []), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=environment | how.pop("environ", {}),
            start_new_session=True,
            **how,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        if child.stdout is not None and not child.stdout.closed:
            child.communicate()


@pytest.fixture(scope="session")
def wait_for() -> Callable[[Path, subprocess.Popen[str]], None]:
    """Waits until a path is there while a process runs."""

    def wait(path: Path, child: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 120
        while not path.exists():
            assert child.poll() is None, child.communicate()[0]
            assert time.monotonic() < end, f"{path} did not appear"
            time.sleep(0.005)

    return wait
