"""What ``--weights`` does with a compressed file: integers as they are, refused, or said to be rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cllm
from cllm.compress.command import compress_run
from cllm.compress.formats import read_integers, read_state
from cllm.compress.settings import Settings
from cllm.infer.engine import Engine
from cllm.store.container import Container
from cllm.training.progress import Silent

Cllm = Callable[..., Any]
QUICK: dict[str, Any] = {"tokens": 256, "beams": 2, "table": "fp16", "scales": "range", "sweeps": 0}


@pytest.fixture(scope="module")
def file_of(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a compressed file; the same settings make it once."""
    place = tmp_path_factory.mktemp("files")
    made: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        torch.set_num_threads(1)
        key = str(sorted(changes.items()))
        if key not in made:
            out = place / f"{len(made)}.cllm"
            made[key] = compress_run(trained, Settings(**QUICK | changes), Silent(), out=out).path
        return made[key]

    return make


def logits(
    path: Path, weights: str, say: Callable[[str], None] = lambda line: None
) -> torch.Tensor:
    """Of a text that is read and gone on with."""
    engine = cllm.load(path).engine(weights=weights, say=say)
    torch.set_num_threads(1)
    engine.start(0, [1, 2, 3])
    return torch.stack([engine.step({0: token}).logits[0] for token in (4, 5)])


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"bits": 4, "method": "rtn"}, "int4", "4 bits in groups of 128, 4 bits in rows"),
        ({"bits": 4, "method": "rtn"}, "int8", "4 bits in groups of 128, 4 bits in rows"),
        ({"bits": 4, "grid": "gguf-q4_0", "method": "rtn"}, "int4", "4 bits in groups of 32"),
        ({"bits": 8, "grid": "gguf-q8_0", "method": "rtn"}, "int8", "8 bits in groups of 32"),
        (
            {"bits": 2, "method": "rtn", "group": "32"},
            "int4",
            "2 bits in groups of 32 with offsets",
        ),
        ({"method": "int8"}, "int8", "8 bits in rows"),
    ],
    ids=str,
)
def test_logits_are_those_of_the_dense_decode(
    changes: dict[str, Any], kind: str, words: str, file_of: Callable[..., Path], isolated: Path
) -> None:
    path, lines = file_of(**changes), []
    wanted, found = logits(path, "fp32"), logits(path, kind, lines.append)
    assert lines == [f"weights {kind}: the file's own integers, {words}"]
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_integers_are_the_files_own_with_those_of_its_table(
    file_of: Callable[..., Path], isolated: Path
) -> None:
    container = Container.open(file_of(method="int8"))
    state, found = read_state(container), read_integers(container)
    assert "embedding.weight" in found
    assert set(found) == {name for name, weight in state.items() if weight.dim() == 2}
    for name, held in found.items():
        assert torch.equal(held.dense(), state[name])
    engine = cllm.load(container.path).engine(weights="int8")
    assert type(engine.network.head).__name__ == "Int8"


def test_what_does_not_fit_is_one_line(
    file_of: Callable[..., Path], isolated: Path, cllm: Cllm
) -> None:
    result = cllm("generate", file_of(bits=8, grid="gguf-q8_0", method="rtn"), "--weights", "int4")
    assert result.code == 2
    assert result.err.splitlines()[-1] == (
        "cllm: --weights int4 cannot hold the file's integers as they are: they have 8 bits; use "
        "int8 or fp32"
    )
    result = cllm("generate", file_of(bits=2, method="rtn"), "--weights", "int8")
    assert (result.code, result.out) == (2, "")
    assert "they have an offset beside the scale; use int4 or fp32" in result.err


@pytest.mark.parametrize(
    "changes",
    [{"method": "fp16"}, {"bits": 4, "rotate": "hadamard", "method": "rtn"}],
    ids=str,
)
def test_what_is_stored_otherwise_is_rounded_and_a_line_says_so(
    changes: dict[str, Any], file_of: Callable[..., Path], isolated: Path
) -> None:
    path, lines = file_of(**changes), []
    assert read_integers(Container.open(path)) == {}
    wanted, found = logits(path, "fp32"), logits(path, "int8", lines.append)
    assert lines == [
        "weights int8: the file's layers are no integers with scales, and are rounded to the nearest"
    ]
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.1


def test_auto_takes_them_only_where_that_was_measured_to_be_faster(
    file_of: Callable[..., Path], isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cllm.infer.measure.is_busy", lambda threads: None)
    seconds = {"fp32": 2.0, "bf16": 3.0, "int8": 4.0, "int4": 1.0}
    asked: list[tuple[str, str]] = []

    def measured(engine: Engine) -> float:
        asked.append((engine.options.weights, engine.network.integers))
        return seconds[engine.options.weights]

    monkeypatch.setattr("cllm.infer.measure._step_seconds", measured)
    four, eight = file_of(bits=4, method="rtn", group="32"), file_of(method="int8")
    words = "4 bits in groups of 32"
    assert cllm.load(four).engine(weights="auto").options.weights == "int4"
    assert asked == [("fp32", ""), ("bf16", ""), ("int8", words), ("int4", words)]
    asked.clear()
    seconds["int4"] = 9.0
    assert cllm.load(eight).engine(weights="auto").options.weights == "fp32"
    assert asked == [("fp32", ""), ("bf16", ""), ("int8", "8 bits in rows")]
    asked.clear()
    assert cllm.load(four).engine(weights="auto").options.weights == "int4"  # as measured before
    assert asked == []


def test_a_run_is_rounded_as_before(trained: Path, isolated: Path) -> None:
    lines: list[str] = []
    cllm.load(trained).engine(weights="int8", say=lines.append)
    assert lines == []
