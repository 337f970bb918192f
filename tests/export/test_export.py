"""``cllm export`` and ``cllm verify``: places, wrong input, and that nothing is left half-written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cllm.core.errors import UserError
from cllm.export.export import export
from cllm.export.formats import FORMATS
from cllm.export.verify import verify
from cllm.store import checkpoint as checkpoints

pytest.importorskip("transformers")

Cllm = Callable[..., Any]


@pytest.fixture
def run(trained: Path, isolated: Path) -> Path:
    """A copy of the trained run, to be changed."""
    shutil.copytree(trained, isolated / "runs" / "mine", symlinks=True)
    return isolated / "runs" / "mine"


def refused(result: Any, *parts: str) -> None:
    """One line on stderr that holds ``parts``."""
    assert result.code in (1, 2)
    line = result.err.splitlines()[-1]
    assert line.startswith("cllm: ")
    assert "Traceback" not in result.err
    for part in parts:
        assert part in line


def everything(path: Path) -> set[str]:
    """All that lies there."""
    return {str(file.relative_to(path)) for file in path.rglob("*")}


def test_the_run_itself_is_the_place_if_nothing_is_said(cllm: Cllm, run: Path) -> None:
    result = cllm("export", run, "--to", "hf")
    assert result.code == 0, result.err
    assert (run / "export" / "mine-hf" / "config.json").is_file()
    assert "checked in transformers" in result.out
    again = cllm("export", run, "--to", "hf")
    refused(again, "exists; --force replaces it")
    assert cllm("export", run, "--to", "hf", "--force", "--no-check").code == 0
    assert {path.name for path in (run / "export").iterdir()} == {"mine-hf"}
    scored = cllm("verify", run / "export" / "mine-hf", "--run", run)
    assert scored.code == 0
    assert "bits per byte" in scored.out


def test_verify_scores_the_file_and_not_the_run(cllm: Cllm, run: Path, corpus: Path) -> None:
    made = export(run, "hf", out=run / "out", checking=False)
    own = verify(made.path, run, data=[str(corpus)])
    assert own.rise == pytest.approx(0, abs=1e-5)
    weights = load_file(made.path / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 30
    save_file(weights, made.path / "model.safetensors", metadata={"format": "pt"})
    worse = verify(made.path, run, data=[str(corpus)])
    assert worse.run == own.run
    assert worse.rise > 0.01
    assert not worse.holds
    result = cllm("verify", made.path, "--run", run, "--data", corpus)
    assert result.code == 1
    assert f"{worse.file.bpb:.4f}" in result.out
    loose = str(worse.rise + 0.01)
    assert cllm("verify", made.path, "--run", run, "--data", corpus, "--threshold", loose).code == 0


def test_unknown_names_are_refused(cllm: Cllm, run: Path) -> None:
    refused(cllm("export", run, "--to", "huf"), "'huf' (did you mean 'hf'?)", "known: ")
    refused(cllm("export", run, "--to", "hf", "--dtype", "fp8"), "hf has no dtype 'fp8'", "bf16")
    refused(cllm("export", run.parent / "none", "--to", "hf"), "none does not exist")
    refused(cllm("verify", run / "none", "--run", run), "there is no exported file")
    refused(cllm("verify", run / "run.toml", "--run", run), "is none of the formats")
    refused(cllm("verify", run, "--run", run), "`cllm export` did not make")


def test_help_names_the_formats() -> None:
    from cllm.cli import export as commands

    assert re.findall(r"[a-z-]+", commands.FORMATS.replace(" or ", ", ")) == list(FORMATS)


def test_names_must_end_as_their_programs_want(cllm: Cllm, run: Path) -> None:
    refused(cllm("export", run, "--to", "aoti", "--out", "x.bin"), "files for aoti end in .pt2")


def test_single_files_are_whole_or_not_there(cllm: Cllm, run: Path, isolated: Path) -> None:
    pytest.importorskip("gguf")
    assert cllm("export", run, "--to", "gguf", "--out", "a/b/x.gguf").code == 0
    assert everything(isolated / "a") == {"b", "b/x.gguf"}
    assert cllm("verify", "a/b/x.gguf", "--run", run).code == 0
    before = (isolated / "a/b/x.gguf").read_bytes()
    refused(cllm("export", run, "--to", "gguf", "--out", "a/b/x.gguf"), "--force replaces it")
    again = cllm("export", run, "--to", "gguf", "--out", "a/b/x.gguf", "--force", "--dtype", "f16")
    assert again.code == 0
    assert len((isolated / "a/b/x.gguf").read_bytes()) < len(before)
    assert everything(isolated / "a") == {"b", "b/x.gguf"}


def test_torchscript_is_said_to_be_deprecated(cllm: Cllm, run: Path) -> None:
    result = cllm("export", run, "--to", "torchscript")
    assert result.code == 0, result.err
    assert "torch 2.13 calls TorchScript deprecated" in result.out + result.err
    assert cllm("verify", run / "export" / "mine.pt", "--run", run).code == 0


def test_what_is_not_an_export_is_never_replaced(cllm: Cllm, run: Path, isolated: Path) -> None:
    (isolated / "thesis").mkdir()
    (isolated / "thesis" / "chapter.txt").write_text("mine")
    (isolated / "file").write_text("mine")
    before = everything(isolated)
    for place in ("thesis", "file"):
        refused(cllm("export", run, "--to", "hf", "--out", place), "exists; --force")
        refused(cllm("export", run, "--to", "hf", "--out", place, "--force"), "choose --out")
    refused(cllm("export", run, "--to", "hf", "--out", "file/x"), "a file, not a directory")
    assert everything(isolated) == before


@pytest.mark.parametrize(
    "to",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("onnx", "aoti") else ())
        for name in FORMATS
    ],
)
def test_force_replaces_our_own_export_and_nothing_that_looks_like_one(
    run: Path, isolated: Path, to: str
) -> None:
    pytest.importorskip({"gguf": "gguf", "onnx": "onnxscript"}.get(to, "torch"))
    target = FORMATS[to]
    made = export(run, to, out=isolated / f"x{target.suffix}", checking=False).path
    export(run, to, out=made, force=True, checking=False)
    if target.directory:
        (made / "thesis.tex").write_text("mine")
        with pytest.raises(UserError, match=r"it holds thesis.tex\): remove it yourself"):
            export(run, to, out=made, force=True, checking=False)
        assert (made / "thesis.tex").read_text() == "mine"
        (made / "thesis.tex").unlink()
    file = (
        made / {"hf": "model.safetensors", "onnx": "model.onnx"}[to] if target.directory else made
    )
    whole = file.read_bytes()
    for mark in (b"cllm.export", b"\x12\x04cllm"):  # as another program writes such a file
        whole = whole.replace(mark, mark[:-1] + b"x")
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"says that cllm made it\): remove it yourself"):
        export(run, to, out=made, force=True, checking=False)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("to", FORMATS)
def test_damaged_runs_leave_nothing(cllm: Cllm, run: Path, to: str) -> None:
    step = checkpoints.find(run, "best")
    weights = step / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    before = everything(run.parent)
    refused(cllm("export", run, "--to", to), "model.safetensors is damaged")
    (run / "tokenizer.json").rename(run / "hidden")
    refused(cllm("export", run, "--to", to), "there is no tokenizer file")
    (run / "hidden").rename(run / "tokenizer.json")
    assert everything(run.parent) == before


def test_a_failing_check_leaves_the_older_export(
    run: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cllm.export import hf

    made = export(run, "hf", out=isolated / "out", checking=False)
    (made.path / "README.md").write_text("mine")
    before = everything(isolated)

    def other(source: Any, dtype: str, path: Path) -> Any:
        model = write(source, dtype, path)
        with torch.no_grad():
            model.norm.weight.mul_(1.5)
        return model

    write = hf.write
    monkeypatch.setattr(hf, "write", other)
    with pytest.raises(UserError, match="nothing was written"):
        export(run, "hf", out=isolated / "out", force=True)
    assert everything(isolated) == before
    assert (made.path / "README.md").read_text() == "mine"


def test_a_truncated_export_is_one_line(cllm: Cllm, run: Path, isolated: Path) -> None:
    made = export(run, "hf", out=isolated / "out", checking=False)
    file = made.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(cllm("verify", made.path, "--run", run), "transformers cannot load")
    (made.path / "config.json").write_text('{"archi')
    refused(cllm("verify", made.path, "--run", run), "is not JSON, or cut short")
