"""Wrong input to ``cllm export`` and ``cllm verify``, in any format: one line, nothing left behind."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cllm.export.export import export
from cllm.export.formats import FORMATS
from cllm.store import checkpoint as checkpoints

Cllm = Callable[..., Any]


@pytest.fixture
def run(trained: Path, isolated: Path) -> Path:
    """A copy of the trained run, to be changed."""
    shutil.copytree(trained, isolated / "runs" / "mine", symlinks=True)
    return isolated / "runs" / "mine"


@pytest.fixture
def damaged(run: Path) -> Path:
    """The run with a NaN in the last layer of its best checkpoint."""
    saved = checkpoints.load(run, "best")
    weights = {name: tensor.clone() for name, tensor in saved.weights.items()}
    last = [name for name in weights if name.endswith("mlp.out.weight")][-1]
    weights[last][2, 3] = float("nan")
    checkpoints.save(
        run,
        saved.step + 1,
        weights=weights,
        optimizer=saved.optimizer,
        state=saved.state,
        keep_last=2,
        best=True,
    )
    return run


def refused(result: Any, *parts: str) -> None:
    """One line on stderr that holds ``parts``, and it is the last."""
    assert result.code in (1, 2), result.out + result.err
    lines = [line for line in result.err.splitlines() if line.startswith("cllm: ")]
    assert len(lines) == 1, result.err
    assert result.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.err
    for part in parts:
        assert part in lines[0]


def everything(path: Path) -> set[str]:
    """All that lies there."""
    return {str(file.relative_to(path)) for file in path.rglob("*")}


@pytest.mark.parametrize("to", FORMATS)
def test_a_nan_in_the_weights_is_named_by_every_format(cllm: Cllm, damaged: Path, to: str) -> None:
    before = everything(damaged.parent)
    refused(cllm("export", damaged, "--to", to), "mlp.out.weight holds 1 numbers", "not finite")
    assert everything(damaged.parent) == before


def test_a_nan_in_the_weights_stops_verify_and_compress(
    cllm: Cllm, damaged: Path, isolated: Path
) -> None:
    (isolated / "x-hf").mkdir()
    (isolated / "x-hf" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    before = everything(isolated)
    refused(cllm("verify", "x-hf", "--run", damaged), "mlp.out.weight", "not finite")
    refused(cllm("compress", damaged, "--out", "x.cllm"), "mlp.out.weight holds NaN or infinity")
    assert everything(isolated) == before


def test_a_nan_in_the_exported_file_is_named(cllm: Cllm, run: Path) -> None:
    pytest.importorskip("transformers")
    made = export(run, "hf", out=run / "out", checking=False)
    weights = load_file(made.path / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, made.path / "model.safetensors", metadata={"format": "pt"})
    refused(cllm("verify", made.path, "--run", run), "gives logits that are not finite")


@pytest.mark.parametrize("to", FORMATS)
def test_an_existing_place_is_left_alone_by_every_format(
    cllm: Cllm, run: Path, isolated: Path, to: str
) -> None:
    place = isolated / f"there{FORMATS[to].suffix}"
    if FORMATS[to].directory:
        place.mkdir()
        (place / "mine").write_text("mine")
    else:
        place.write_text("mine")
    before = everything(isolated)
    refused(cllm("export", run, "--to", to, "--out", place), "exists; --force replaces it")
    refused(cllm("export", run, "--to", to, "--out", place, "--force"), "is no earlier", to)
    assert everything(isolated) == before


EXTRAS = [
    ("hf", "transformers"),
    ("gguf", "gguf"),
    ("onnx", "onnx"),
    ("onnx", "onnxscript"),
    ("onnx", "onnxruntime"),
]


@pytest.mark.parametrize(("to", "module"), EXTRAS)
def test_a_missing_extra_names_the_line_before_anything_is_written(
    cllm: Cllm, run: Path, to: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if to == "onnx":  # what is not taken away must be there
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, module, None)
    before = everything(run)
    result = cllm("export", run, "--to", to)
    refused(result, f"the package {module!r}: pip install 'cllm[{to}]'")
    assert "opening it" not in result.err
    assert everything(run) == before


HEADS = {
    "x-hf/config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "x.gguf": b"GGUF",
    "x-onnx/model.onnx": b"",
}
"""The least by which each format is known."""


@pytest.mark.parametrize("name", HEADS)
def test_verify_names_the_line_of_a_missing_extra(
    cllm: Cllm, run: Path, isolated: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = isolated / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(HEADS[name])
    for module in ("transformers", "gguf", "llama_cpp", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    path = isolated / Path(name).parts[0]
    refused(cllm("verify", path, "--run", run), "pip install 'cllm[")


def test_aoti_without_a_compiler_says_so(
    cllm: Cllm, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cllm.export.aoti.cannot_compile", lambda: "no compiler was found")
    before = everything(run)
    result = cllm("export", run, "--to", "aoti")
    refused(result, "aoti needs a C++ compiler: no compiler was found; export to torch-export")
    assert everything(run) == before


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_every_file_of_an_export_may_be_cut_anywhere(
    cllm: Cllm, run: Path, isolated: Path, to: str
) -> None:
    pytest.importorskip({"hf": "transformers", "gguf": "gguf"}[to])
    made = export(run, to, out=isolated / f"x{FORMATS[to].suffix}", checking=False).path
    needed = ("model.safetensors", "config.json", "tokenizer.json")
    files = [made] if made.is_file() else [made / name for name in needed]
    for file in files:
        whole = file.read_bytes()
        for size in (0, 3, len(whole) // 2, len(whole) - 9):
            file.write_bytes(whole[:size])
            result = cllm("verify", made, "--run", run)
            refused(result, str(made))
            assert not any(word in result.err for word in ("reshape", "ndarray", "buffer"))
        file.write_bytes(whole)


def test_an_empty_file_is_called_empty(cllm: Cllm, run: Path, isolated: Path) -> None:
    (isolated / "x.pt2").touch()
    refused(cllm("verify", "x.pt2", "--run", run), "x.pt2 is empty; export anew")
