"""What the tests of the upper floors share: a small text, small settings, and the command line."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# A busy machine fails no test.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")

NOUNS = ["cat", "dog", "river", "stone", "child", "teacher", "window", "garden", "letter", "boat"]
VERBS = ["sees", "finds", "carries", "follows", "remembers", "paints", "opens", "keeps"]
ADJECTIVES = ["old", "quiet", "green", "narrow", "bright", "heavy", "small", "distant"]

FAST = {
    "model.preset": "nano",
    "tokenizer.vocab_size": 300,
    "train.compile": "off",
    "train.device": "cpu",
    "train.dtype": "fp32",
    "train.attention": "matmul",
    "train.threads": 1,
    "train.batch_size": 4,
    "train.steps": 12,
    "train.eval_every": 6,
    "train.checkpoint_every": 4,
    "log.every": 1,
    "log.sample_tokens": 4,
    "log.tensorboard": False,
}
"""Settings of a run that takes a second or two."""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


def sentences(count: int, seed: int = 1) -> str:
    """English-like lines, all different enough to be no duplicates of each other."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        words = (
            f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} the "
            f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.randrange(1000)} times."
            for _ in range(6)
        )
        lines.append(" ".join(words))
    return "\n".join(lines) + "\n"


def as_options(settings: dict[str, Any]) -> list[str]:
    """``--set key=value`` for each setting."""
    options = []
    for key, value in settings.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        options += ["--set", f"{key}={text}"]
    return options


@pytest.fixture(scope="session")
def text_of() -> Callable[..., str]:
    """``sentences``."""
    return sentences


@pytest.fixture(scope="session")
def fast() -> dict[str, Any]:
    """``FAST``, a copy."""
    return dict(FAST)


@pytest.fixture(scope="session")
def options() -> Callable[..., list[str]]:
    """Makes ``--set`` options of the fast settings, with some changed."""

    def make(**changes: Any) -> list[str]:
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        return as_options(FAST | changed)

    return make


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory for all tests of this process."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session", autouse=True)
def own_cache(cache: Path) -> Iterator[None]:
    """No test sees what the developer's cache directory holds (compiled kernels, measurements)."""
    with environ("CLLM_CACHE", str(cache)):
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some 65 kB."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(sentences(200), encoding="utf-8")
    return path


@pytest.fixture
def isolated(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An own working directory, the tests' cache, and one thread; returns the directory."""
    import torch

    monkeypatch.setenv("CLLM_CACHE", str(cache))
    monkeypatch.delenv("CLLM_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


@pytest.fixture
def cllm(isolated: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., Result]:
    """Runs ``cllm ARGUMENTS…`` in this process, as the shell would."""

    def run(*arguments: object) -> Result:
        return call_main([str(argument) for argument in arguments], monkeypatch, capfd)

    return run


def call_main(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Result:
    """``cllm.cli.main`` with these arguments."""
    from cllm.cli import main

    monkeypatch.setattr(sys, "argv", ["cllm", *arguments])
    capfd.readouterr()
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os.environ.pop("CLLM_DEBUG", None)
    out, err = capfd.readouterr()
    return Result(code, out, err)


def environment(cache: Path) -> dict[str, str]:
    """The environment of a process of its own."""
    mine = {"CLLM_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return {k: v for k, v in os.environ.items() if k != "CLLM_DEBUG"} | mine


@pytest.fixture
def process(cache: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``cllm ARGUMENTS…`` as a process of its own; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **changes: Any) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [*changes.pop("before", ()), sys.executable, "-m", "cllm", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            **{"env": environment(cache)} | changes,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        if child.poll() is None:
            child.kill()
        child.communicate()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path, corpus: Path) -> Path:
    """A finished run, to be looked at and not to be changed."""
    import cllm

    out = tmp_path_factory.mktemp("runs") / "trained"
    with environ("CLLM_CACHE", str(cache)):
        settings = {k.replace(".", "__"): v for k, v in (FAST | {"train.steps": 40}).items()}
        cllm.train(data=corpus, out=out, quiet=True, **settings)
    return out


@contextmanager
def environ(name: str, value: str) -> Iterator[None]:
    """An environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@pytest.fixture
def told() -> Any:
    """A progress that keeps what would be shown, in ``said``."""
    from cllm.training.progress import Silent

    class Recorder(Silent):
        def __init__(self) -> None:
            super().__init__()
            self.said: list[str] = []

        def say(self, text: str) -> None:
            self.said.append(text)

    return Recorder()


@pytest.fixture(scope="session")
def incidence_of() -> Callable[[int, int], Any]:
    """Makes a (tokens, pieces) incidence: three different pieces a token, the token's own among them."""

    def make(tokens: int, pieces: int) -> Any:
        import numpy as np
        from scipy import sparse

        token = np.arange(tokens)[:, None]
        columns = np.sort((token + np.array([0, pieces // 4, pieces // 2])) % pieces, axis=1)
        offsets = 3 * np.arange(tokens + 1)
        ones = np.ones(columns.size)
        return sparse.csr_matrix((ones, columns.ravel(), offsets), shape=(tokens, pieces))

    return make
