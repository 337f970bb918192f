"""Reference runs are trained once, kept by configuration and text, and gone on with when interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllm.bench.reference import reference_key, reference_run
from cllm.core.config import Config
from cllm.core.settings import build
from cllm.training.trainer import Trainer


@pytest.fixture
def config(isolated: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path, fast: Any) -> Config:
    monkeypatch.setenv("CLLM_CACHE", str(isolated / "own-cache"))
    return build(fast | {"data.paths": (str(corpus),), "train.steps": 4})


def test_a_reference_run_is_trained_once(config: Config) -> None:
    first = reference_run(config)
    assert first.status().state == "finished"
    stamp = (first.path / "status.json").stat().st_mtime_ns
    again = reference_run(config)
    assert again.path == first.path
    assert (again.path / "status.json").stat().st_mtime_ns == stamp


def test_an_interrupted_reference_run_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Trainer, interrupt: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", stop)
        with pytest.raises(KeyboardInterrupt):
            reference_run(config)
    run = reference_run(config)
    assert run.status().state == "finished"
    assert run.steps()[-1] == 4


def test_the_key_is_settings_and_text(config: Config, tmp_path: Path, corpus: Path) -> None:
    key = reference_key(config)
    moved = tmp_path / "moved.txt"
    moved.write_bytes(corpus.read_bytes())
    assert reference_key(config.replace(data__paths=(str(moved),))) == key
    assert reference_key(config.replace(train__lr=1e-4)) != key
    assert reference_key(config.replace(train__similarity__weight=1.0)) != key
    # What is at its default is no part of it, or a new setting would make all runs new.
    assert reference_key(config.replace(train__weight_decay=config.train.weight_decay)) == key
    moved.write_bytes(corpus.read_bytes() + b"more")
    assert reference_key(config.replace(data__paths=(str(moved),))) != key
