"""A run becomes one file: what it scores, that it is enough by itself, and what is refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cllm
from cllm.compress import pipeline
from cllm.compress.calibration import calibrate, calibration_windows, layers_in_order
from cllm.compress.command import compress_run, parse_share, parse_size
from cllm.compress.formats import read_fixed, read_packed, read_state
from cllm.compress.settings import Settings
from cllm.core.errors import UsageError, UserError
from cllm.store import checkpoint
from cllm.store.container import Container
from cllm.store.packing import GridMatrix
from cllm.text.dataset import load_prepared
from cllm.training.progress import Silent

Cllm = Callable[..., Any]
QUICK = {"tokens": 256, "beams": 2, "table": "fp16", "scales": "range", "sweeps": 0}


def make(run: Path, out: Path, **changes: Any) -> Any:
    """Compress ``run`` quickly."""
    torch.set_num_threads(1)  # which opening a run has raised
    return compress_run(run, Settings(**(QUICK | changes)), Silent(), out=out)


@pytest.fixture
def plain(trained: Path) -> Any:
    """The run before."""
    return cllm.load(trained)


def test_statistics_are_those_of_the_inputs_and_of_what_was_replaced_before(
    trained: Path, plain: Any, isolated: Path
) -> None:
    windows = calibration_windows(load_prepared(plain.directory.data).train, 64, count=640, seed=1)
    assert windows.shape == (10, 64)
    model = cllm.load(trained).model
    seen: dict[str, list[torch.Tensor]] = {}
    names = layers_in_order(model)
    moments = {}
    for layer in calibrate(model, windows):
        moments[layer.name] = layer
        with torch.no_grad():
            layer.linear.weight.mul_(0.5)
    assert list(moments) == names
    # The model as it is now made the inputs of each layer: none depends on a layer after it.
    hooks = []
    for name in names:

        def keep(module: Any, inputs: Any, name: str = name) -> None:
            seen.setdefault(name, []).append(inputs[0].flatten(0, -2).double())

        hooks.append(model.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        model.hidden(torch.as_tensor(windows))
    for name, layer in moments.items():
        rows = seen[name][0]
        held, fit = rows[: 2 * 64], rows[2 * 64 :]
        torch.testing.assert_close(layer.held, held.T @ held / len(held), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(layer.fit, fit.T @ fit / len(fit), rtol=1e-4, atol=1e-7)


def test_a_table_of_zeros_is_refused_and_leaves_nothing(trained: Path, isolated: Path) -> None:
    path = isolated / "spoiled"
    shutil.copytree(trained, path, symlinks=True)
    saved = checkpoint.load(path)
    checkpoint.save(
        path,
        saved.step,
        weights=saved.weights
        | {"embedding.weight": torch.zeros_like(saved.weights["embedding.weight"])},
        optimizer=saved.optimizer,
        state=saved.state,
        keep_last=1,
        best=True,
    )
    with pytest.raises(
        UserError, match=r"the token table cannot be stored so: .* no positive trace"
    ):
        make(path, isolated / "out.cllm", table="lattice")
    assert not list(isolated.glob("out.cllm*"))


def test_calibration_refuses_what_is_not_finite(trained: Path, plain: Any, isolated: Path) -> None:
    model = cllm.load(trained).model
    with torch.no_grad():
        model.layers[0].mlp.out.weight[0, 0] = torch.nan
    windows = calibration_windows(load_prepared(plain.directory.data).train, 64, count=128)
    with pytest.raises(UserError, match=r"inputs of layers\.1\.attention\.qkv .* NaN"):
        list(calibrate(model, windows))
    with pytest.raises(UserError, match="two windows"):
        list(calibrate(model, windows[:1]))


def test_eight_bits_cost_next_to_nothing_and_two_bits_something(
    trained: Path, plain: Any, isolated: Path
) -> None:
    base = plain.evaluate().bpb
    rises = {}
    for bits in (8, 2):
        made = make(trained, isolated / f"{bits}.cllm", bits=bits)
        assert made.base == pytest.approx(base)
        assert made.bpb == pytest.approx(make_again(made, trained), rel=1e-6)
        rises[bits] = made.rise / base
    assert abs(rises[8]) < 1e-3
    assert rises[8] < rises[2]


def make_again(made: Any, run: Path) -> float:
    """What the file scores when it is loaded anew, on the run's own validation text."""
    loaded = cllm.load(made.path)
    tokens = load_prepared(cllm.load(run).directory.data).validation
    return loaded._score(tokens, Silent()).bpb


def test_the_file_alone_is_enough(
    trained: Path, corpus: Path, isolated: Path, cllm: Cllm, plain: Any
) -> None:
    made = make(trained, isolated / "a.cllm", bits=4)
    shutil.move(made.path, isolated / "elsewhere.cllm")
    (isolated / "some.txt").write_text(corpus.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    result = cllm("generate", "elsewhere.cllm", "--max-tokens", 5, "--prompt", "The cat")
    assert result.code == 0
    assert result.out.startswith("The cat")
    result = cllm("eval", "elsewhere.cllm", "--data", "some.txt", "--quiet")
    assert "bits per byte" in result.out
    result = cllm("eval", "elsewhere.cllm")
    assert result.code == 1
    assert "give some (--data)" in result.err
    text = (isolated / "elsewhere.cllm").read_bytes()
    assert str(corpus).encode() not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 3, "group": "32", "symmetric": True},
        {"bits": 4, "grid": "gguf-q4_0"},
        {"bits": 8, "grid": "gguf-q8_0", "method": "babai"},
        {"bits": 2, "method": "rtn", "scales": "range"},
        {"bits": 2, "method": "klein"},
        {"method": "fp16"},
        {"method": "bf16"},
        {"bits": 1.7, "grid": "coded", "table": "lattice"},
        {"bits": 3, "grid": "coded", "method": "babai", "columns": "water", "table": "int8"},
        {"bits": 2.5, "grid": "coded", "lattice": "e8", "rotate": "hadamard"},
        {"bits": 3, "grid": "coded", "lattice": "leech", "method": "babai"},
        {"bits": 2, "grid": "e8", "method": "babai", "rotate": "hadamard", "group": "row"},
        {"bits": 2, "grid": "leech", "method": "rtn", "group": "row"},
        {"bits": 3, "group": "32", "rotate": "hadamard"},
    ],
    ids=str,
)
def test_every_kind_reads_back_what_was_scored(
    changes: dict[str, Any], trained: Path, isolated: Path
) -> None:
    if changes.get("grid") == "coded":
        pytest.importorskip("constriction")
    made = make(trained, isolated / "a.cllm", **changes)
    assert make_again(made, trained) == pytest.approx(made.bpb, rel=1e-6)
    assert made.bytes == made.path.stat().st_size
    if changes.get("grid") == "coded":
        assert 0.93 * changes["bits"] <= made.layer_bits <= changes["bits"]
    elif changes.get("grid") in ("e8", "leech"):
        assert 2 < made.layer_bits < 2.7  # a scale for each row
    elif "grid" in changes:
        assert made.layer_bits == {"gguf-q4_0": 4.5, "gguf-q8_0": 8.5}[changes["grid"]]
    container = Container.open(made.path)
    packed, dense = read_packed(container), read_state(container)
    for name, weight in packed.items():
        if isinstance(weight, GridMatrix):
            assert torch.equal(weight.dense(), dense[name])
        else:
            assert torch.equal(weight, dense[name])
    half = read_state(container, torch.bfloat16)
    assert half["norm.weight"].dtype == torch.bfloat16


def test_rows_of_a_codebook_are_read_alone(trained: Path, isolated: Path) -> None:
    container = Container.open(
        make(trained, isolated / "a.cllm", bits=2, grid="e8", method="babai").path
    )
    name = "layers.0.mlp.out.weight"
    rows = read_fixed(container, name, slice(3, 5)).dense()
    assert torch.equal(rows, read_state(container)[name][3:5])
    with pytest.raises(UserError, match="in no codebook"):
        read_fixed(container, "norm.weight")


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_parts_of_a_codebook_that_do_not_fit_are_refused(
    part: str, trained: Path, isolated: Path
) -> None:
    container = Container.open(
        make(trained, isolated / "a.cllm", bits=2, grid="e8", method="babai").path
    )
    name = "layers.0.mlp.out.weight"
    stored = container.header.weights[name]
    container.header.weights[name] = replace(
        stored,
        shape=(stored.shape[0], stored.shape[1] + 8) if part == "codes" else stored.shape,
        facts=stored.facts | ({} if part == "codes" else {"group": 8}),
    )
    with pytest.raises(UserError, match="damaged"):
        read_state(container)


def test_what_was_interrupted_goes_on_and_comes_to_the_same_bytes(
    trained: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(trained, isolated / "whole.cllm", bits=3).path.read_bytes()
    real, done = pipeline.compress_layer, []

    def failing(layer: Any, *rest: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(layer.name)
        return real(layer, *rest)

    monkeypatch.setattr(pipeline, "compress_layer", failing)
    out = isolated / "cut.cllm"
    with pytest.raises(KeyboardInterrupt):
        make(trained, out, bits=3)
    assert not out.exists()
    again = []

    def counting(layer: Any, *rest: Any) -> Any:
        again.append(layer.name)
        return real(layer, *rest)

    monkeypatch.setattr(pipeline, "compress_layer", counting)
    make(trained, out, bits=3)
    assert not set(done) & set(again)
    assert len(done) + len(again) == 8
    assert out.read_bytes() == whole
    assert [path.name for path in isolated.glob("*.parts")] == []


def test_a_size_is_kept_and_what_is_impossible_says_the_least(
    trained: Path, isolated: Path
) -> None:
    pytest.importorskip("constriction")
    settings = Settings(**(QUICK | {"grid": "coded", "table": "lattice"}))
    made = compress_run(trained, settings, Silent(), out=isolated / "a.cllm", size="60KB")
    assert 0.9 * 60_000 <= made.bytes <= 60_000
    bits = {round(layer["bits"], 2) for layer in made.layers}
    assert len(bits) > 3
    with pytest.raises(UserError, match=r"the least possible is [\d,]+"):
        compress_run(trained, settings, Silent(), out=isolated / "b.cllm", size="3KB")


@pytest.mark.parametrize("changes", [{"table": "lattice"}, {"grid": "coded"}], ids=str)
def test_a_missing_extra_is_named_before_any_work(
    changes: dict[str, Any], trained: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    monkeypatch.setattr("cllm.compress.command.open_source", lambda *given: pytest.fail("work"))
    with pytest.raises(UserError, match=r"pip install 'cllm\[compress\]'"):
        make(trained, isolated / "made" / "a.cllm", **changes)
    assert not (isolated / "made").exists()


def test_a_rise_is_kept_by_the_fewest_bits(trained: Path, isolated: Path) -> None:
    settings = Settings(**QUICK)
    made = compress_run(trained, settings, Silent(), out=isolated / "a.cllm", increase="5%")
    assert made.rise <= 0.05 * made.base
    with pytest.raises(UserError, match="no bits of this grid keep within"):
        compress_run(
            trained,
            Settings(**(QUICK | {"table": "lattice", "table_bits": 0.7})),
            Silent(),
            out=isolated / "b.cllm",
            increase="0.0001%",
        )


def test_the_command_makes_file_and_report(trained: Path, isolated: Path, cllm: Cllm) -> None:
    result = cllm("compress", trained, "--bits", 3, "--beams", 2, "--tokens", 256, "--table", "fp16",
                  "--out", "made/a.cllm", "-q")  # fmt: skip
    assert result.code == 0, result.err
    assert "bits a weight" in result.out
    report = isolated / "made" / "a-report" / "report.md"
    text = report.read_text(encoding="utf-8")
    assert "layers.0.attention.qkv.weight" in text
    assert (report.parent / "bits.png").is_file()
    assert (report.parent / "error.png").is_file()
    again = cllm("compress", "made/a.cllm")
    assert again.code == 2
    assert "compressed already" in again.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", 5], "2, 3, 4 or 8 bits"),
        (["--bits", 2.5], "--grid coded takes any rate"),
        (["--method", "k-bets"], "did you mean 'k-best'"),
        (["--grid", "gguf-q4_0", "--bits", 3], "gguf-q4_0 has 4 bits"),
        (["--grid", "coded", "--bits", 99], "bits a weight"),
        (["--size", "1KB"], "--grid coded"),
        (["--size", "small", "--grid", "coded"], "600KB"),
        (["--target-bpb-increase", "lots"], "1%"),
        (["--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--out", "model.bin"], ".cllm"),
        (["--group", "48"], "--group is one of"),
        (["--lattice", "d4"], "--lattice is one of"),
        (["--rotate", "givens"], "--rotate is one of"),
        (["--rotate", "hadamard", "--method", "fp16"], "fp16 is read without"),
        (["--grid", "e8", "--method", "babai", "--bits", 5], "2, 3, 4 or 8 bits a weight"),
        (["--grid", "e8", "--bits", 2], "takes --method babai or rtn, not k-best"),
        (["--grid", "leech", "--method", "klein"], "--grid leech takes"),
        (["--grid", "e8", "--method", "babai", "--order", "min-pivot"], "--order act or natural"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    arguments: list[Any], words: str, trained: Path, isolated: Path, cllm: Cllm
) -> None:
    result = cllm("compress", trained, "--tokens", 256, "-q", *arguments)
    assert result.code in (1, 2)
    assert words in result.err
    assert result.err.count("\n") == 1
    assert not list(isolated.glob("*.cllm"))


def test_sizes_and_shares_are_read() -> None:
    assert parse_size("600KB") == 600_000
    assert parse_size("1.5 MB".replace(" ", "")) == 1_500_000
    assert parse_share("1%") == parse_share("0.01") == 0.01
    for text in ("-1%", "0"):
        with pytest.raises(UsageError):
            parse_share(text)
    assert np.isclose(parse_share("250%"), 2.5)
