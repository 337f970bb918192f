"""Recovery: what is trained is what the file holds, it is never to the worse, and it is reproducible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cllm
from cllm.compress.coded import CodedMatrix, decode_matrix, encode
from cllm.compress.command import compress_run
from cllm.compress.divergence import batch_windows
from cllm.compress.formats import read_weight, store_grid, store_plain
from cllm.compress.grids import GridSpec, as_stored, grid_spec, range_grid
from cllm.compress.layer import Piece, as_bytes
from cllm.compress.learned import RATES, Coded, OnGrid, Vector, learned
from cllm.compress.pipeline import compress
from cllm.compress.recovery import HELD, recover, recovery_windows
from cllm.compress.settings import Settings
from cllm.compress.source import open_source
from cllm.store.container import Container, Stored
from cllm.text.dataset import load_prepared
from cllm.training.progress import Silent

QUICK = {"tokens": 256, "bits": 2, "method": "babai", "table": "fp16", "scales": "range"}


def grid_piece(spec: GridSpec, m: int = 6, n: int = 96) -> Piece:
    """Random codes on ``spec``."""
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(m, n))).float() * 0.1
    grid = range_grid(weight, spec, 0.7)
    step = grid.steps().clone()
    codes = ((weight.double() - grid.offsets()) / step).round().clamp(spec.low, spec.high).long()
    stored, parts = store_grid(grid, codes)
    return Piece(stored, parts, grid.values(codes), {"error": 0.1})


@pytest.mark.parametrize(
    "spec",
    [
        GridSpec(bits=2, symmetric=False, group=64),
        GridSpec(bits=3, symmetric=True, group=0),
        grid_spec(4, grid="gguf-q4_0"),
        grid_spec(8, grid="gguf-q8_0"),
    ],
    ids=lambda spec: f"{spec.bits}{spec.block}",
)
def test_on_a_grid_what_is_trained_is_what_is_stored(spec: GridSpec) -> None:
    piece = grid_piece(spec)
    weight = OnGrid(piece, piece.values, rounding=True)
    assert torch.equal(weight.values(), piece.values)
    assert {k: v.tolist() for k, v in weight.piece().parts.items()} == {
        k: v.tolist() for k, v in piece.parts.items()
    }
    # A step far enough that scales leave their fp16 values and codes would leave the box.
    with torch.no_grad():
        for kind, tensors in weight.parameters().items():
            for tensor in tensors:
                tensor += 0.0123 if kind == "scale" else 0.8
    moved = weight.piece()
    assert torch.equal(weight.values(), moved.values)
    assert not torch.equal(moved.values, piece.values)
    assert 0 < moved.figures["moved"] <= 1
    again = OnGrid(moved, moved.values, rounding=True)
    grid, codes = again.grid, again.codes
    assert int(codes.max()) == spec.high
    assert torch.equal(as_stored(grid.scale), grid.scale)
    kinds = weight.parameters()
    weight.values().square().sum().backward()
    assert all(bool(leaf.grad.any()) for leaves in kinds.values() for leaf in leaves)
    assert list(OnGrid(piece, piece.values, rounding=False).parameters()) == ["scale"]


def test_codes_begin_on_the_way_to_the_weight_and_inside_their_cells() -> None:
    piece = grid_piece(GridSpec(bits=2, symmetric=False, group=64))
    start = OnGrid(piece, piece.values, rounding=True)
    step = start.grid.steps().float()
    lean = torch.linspace(-2, 2, step.numel()).view(step.shape)
    weight = OnGrid(piece, piece.values + lean * step, rounding=True)
    # The file's codes are those of before, whatever the weight was.
    assert torch.equal(weight.values(), piece.values)
    wanted = (weight.codes + (0.5 * lean).clamp(-0.45, 0.45)).clamp(-2, 1)
    torch.testing.assert_close(weight.real.detach(), wanted, rtol=0, atol=1e-3)
    weight.values().sum().backward()
    assert bool((weight.real.grad != 0).all())


def coded_piece(room: int = 0) -> tuple[Piece, np.ndarray]:
    """Integers like those of two bits, with ``room`` more bytes than they take."""
    integers = np.rint(np.random.default_rng(0).normal(size=(40, 60)) * 1.2).astype(np.int64)
    data = encode(CodedMatrix(integers, 0.1, np.zeros(60, dtype=np.int64)))
    stored = Stored(kind="coded", shape=(40, 60))
    figures = {"room": len(data) + room}
    return Piece(stored, {"": as_bytes(data)}, torch.from_numpy(integers) * 0.1, figures), integers


def test_of_coded_integers_the_step_is_trained_and_the_size_stays() -> None:
    pytest.importorskip("constriction")
    piece, integers = coded_piece()
    weight = Coded(piece, rounding=False)
    with torch.no_grad():
        weight.shift += 0.1
    made = weight.piece()
    assert made.bytes == piece.bytes
    torch.testing.assert_close(made.values, torch.from_numpy(integers).float() * 0.11)
    torch.testing.assert_close(weight.values().detach(), made.values)


@pytest.mark.parametrize("room", [-3, 0, 40, 2000])
def test_coded_integers_move_as_far_as_there_is_room(room: int) -> None:
    pytest.importorskip("constriction")
    piece, integers = coded_piece(room)
    weight = Coded(piece, rounding=True)
    with torch.no_grad():
        weight.real += 1.4 * torch.from_numpy(np.random.default_rng(1).random((40, 60)) - 0.3)
    made = weight.piece()
    moved = decode_matrix(made.parts[""].numpy().tobytes()).integers
    assert made.bytes <= piece.bytes + room
    all_of_them = weight.real.detach().round().numpy()
    if room == 2000:
        assert np.array_equal(moved, all_of_them)
    if room < 40:
        assert 0 < (moved != integers).mean() < (all_of_them != integers).mean()
    torch.testing.assert_close(made.values, torch.from_numpy(moved).float() * 0.1)


def test_vectors_are_trained_in_the_precision_of_the_file_and_tables_are_not() -> None:
    stored, parts = store_plain(torch.tensor([1.0, 0.5]), "fp16")
    weight = learned(Piece(stored, parts, parts[""].float()), parts[""], rounding=True)
    assert isinstance(weight, Vector)
    with torch.no_grad():
        weight.real += 1e-5
    assert torch.equal(weight.values(), torch.tensor([1.0, 0.5]))
    table, parts = store_plain(torch.ones(4, 2), "fp16")
    assert learned(Piece(table, parts, parts[""].float()), parts[""], rounding=True) is None
    buffer = Stored(kind="plain", shape=(2,), facts={"buffer": "float32"})
    ones = torch.ones(2)
    assert learned(Piece(buffer, {"": ones}, ones), ones, rounding=True) is None


def made_weights(made: Any) -> dict[str, Stored]:
    """How the file stores each weight."""
    return Container.open(made.path).header.weights


def test_recovery_brings_the_model_nearer_and_the_file_holds_it(
    trained: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few steps would not bring a code to its border.
    monkeypatch.setitem(RATES, "code", 0.05)
    settings = Settings(**QUICK, recover=24)
    made = compress_run(trained, settings, Silent(), out=isolated / "a.cllm")
    facts = made.recovery
    assert facts["divergence"] < 0.8 * facts["divergence_before"]
    assert facts["step"] > 0
    assert made.bpb < facts["bpb_before"]
    loaded = cllm.load(made.path)
    tokens = load_prepared(cllm.load(trained).directory.data).validation
    assert loaded._score(tokens, Silent()).bpb == pytest.approx(made.bpb, rel=1e-6)
    plain = compress_run(trained, Settings(**QUICK), Silent(), out=isolated / "b.cllm")
    assert facts["bpb_before"] == plain.bpb
    assert made.layer_bytes == plain.layer_bytes
    # The same request is the same bytes.
    again = compress_run(trained, settings, Silent(), out=isolated / "c.cllm")
    assert again.path.read_bytes() == made.path.read_bytes()
    kept = Settings(**QUICK, recover=24, recover_codes=False)
    still = compress_run(trained, kept, Silent(), out=isolated / "d.cllm")
    names = [name for name, weight in made_weights(made).items() if weight.kind == "grid"]
    codes = [
        torch.cat([Container.open(f.path).tensor(name, "codes") for name in names])
        for f in (made, still, plain)
    ]
    assert torch.equal(codes[1], codes[2])
    assert not torch.equal(codes[0], codes[2])


def test_a_recovery_that_only_harms_changes_nothing(
    trained: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(trained, Settings(**QUICK, recover=4), Silent())
    model = source.model()
    pieces = {}
    for name, value in model.state_dict().items():
        stored, parts = store_plain(value, "fp32")
        pieces[name] = Piece(stored, parts, value.clone())
    # Nothing to recover: the model is the full one, and every step leads away.
    found = recover(source.model(), model, pieces, source.recovery, Silent(), steps=4)
    assert found.step == 0
    assert found.before == found.after == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(found.pieces[name].values, pieces[name].values) for name in pieces)


def test_windows_are_those_of_calibration_and_more(trained: Path, isolated: Path) -> None:
    source = open_source(trained, Settings(**QUICK, recover=2), Silent())
    assert np.array_equal(source.recovery[: len(source.windows)], source.windows)
    assert source.recovery.shape == (HELD + 2 * batch_windows(64), 64)
    assert len(recovery_windows(source.data.train, 64, 0)) == 0
    with pytest.raises(ValueError, match="without text to recover on"):
        compress(
            open_source(trained, Settings(**QUICK), Silent()),
            Settings(**QUICK, recover=2),
            isolated / "a.cllm",
            Silent(),
        )


@pytest.mark.parametrize(
    "changes", [{"grid": "coded", "bits": 2.0}, {"grid": "gguf-q4_0", "bits": 4}]
)
def test_every_kind_of_layer_recovers(
    changes: dict[str, Any], trained: Path, isolated: Path
) -> None:
    if changes["grid"] == "coded":
        pytest.importorskip("constriction")
    settings = Settings(**(QUICK | changes), recover=8)
    made = compress_run(trained, settings, Silent(), out=isolated / "a.cllm")
    assert made.recovery["divergence"] <= made.recovery["divergence_before"]
    file = Container.open(made.path)
    assert bool(torch.isfinite(read_weight(file, "layers.0.mlp.out.weight")).all())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recover", -1], "number of steps"),
        (["--recover", 5, "--method", "fp16"], "fp16 has none"),
        (["--recover", 5, "--prune", "50%"], "pruned weights have none"),
    ],
    ids=str,
)
def test_what_cannot_recover_is_refused(
    arguments: list[Any], words: str, trained: Path, cllm: Any
) -> None:
    result = cllm("compress", trained, "-q", *arguments)
    assert result.code == 2
    assert words in result.err
    assert result.err.count("\n") == 1


def test_the_command_reports_what_recovery_gave(trained: Path, isolated: Path, cllm: Any) -> None:
    result = cllm("compress", trained, "--bits", 2, "--method", "babai", "--tokens", 256, "--table",
                  "fp16", "--recover", 8, "--out", "a.cllm", "-q")  # fmt: skip
    assert result.code == 0, result.err
    assert "recovery: the state after step" in result.out
    report = (isolated / "a-report" / "report.md").read_text(encoding="utf-8")
    assert "without it" in report
    assert "before recovery" in report
