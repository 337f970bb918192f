"""The container: what comes back, and that no damage goes unseen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.core.errors import UserError
from cllm.store import container
from cllm.store.container import Container, Header, Stored, tensor_name, write_container
from cllm.store.packing import (
    GridMatrix,
    pack_codes,
    pack_rows,
    q4_0_blocks,
    q8_0_blocks,
    read_blocks,
    unpack_codes,
    unpack_rows,
)


def make(path: Path) -> int:
    """A small container."""
    header = Header(
        config="[model]\nd_model = 8\n",
        source={"name": "run", "step": 3, "sha256": "0" * 64},
        method={"bits": 4},
        weights={
            "a": Stored(kind="plain", shape=(2, 3), facts={"dtype": "fp32"}),
            "b": Stored(kind="grid", shape=(2, 4), facts={"bits": 4}),
        },
    )
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        tensor_name("b", "codes"): torch.arange(4, dtype=torch.uint8),
        tensor_name("b", "scales"): torch.ones(2, 1, dtype=torch.float16),
    }
    return write_container(path, header, tensors, '{"model": "ä"}')


def test_all_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.cllm"
    size = make(path)
    assert size == path.stat().st_size
    opened = Container.open(path)
    opened.verify()
    assert opened.bytes == size
    assert opened.tokenizer() == '{"model": "ä"}'
    assert opened.header.weights["b"] == Stored(kind="grid", shape=(2, 4), facts={"bits": 4})
    assert opened.header.source["step"] == 3
    assert torch.equal(opened.tensor("a"), torch.arange(6.0).view(2, 3))
    assert opened.has("b", "codes")
    assert not opened.has("b", "offsets")
    assert list(opened) == ["a", "b"]
    assert opened.sizes()["b"] == 4 + 4
    assert opened.sizes()["a"] == 24


def test_no_damage_goes_unseen(tmp_path: Path) -> None:
    whole = tmp_path / "a.cllm"
    make(whole)
    data, path = whole.read_bytes(), tmp_path / "damaged.cllm"
    rng = np.random.default_rng(0)
    for place in [*range(0, len(data), 7), *rng.integers(0, len(data), 60).tolist()]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged\.cllm .*(damaged|no compressed|version)"):
            Container.open(path).verify()
    for length in [0, 7, 100, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"damaged\.cllm"):
            Container.open(path).verify()
    path.write_bytes(data + b"x")
    with pytest.raises(UserError, match=r"damaged\.cllm"):
        Container.open(path).verify()


def test_tensors_are_read_and_checked_when_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.cllm"
    make(path)
    data = bytearray(path.read_bytes())
    place = data.rindex(bytes(range(4)))  # the codes of b
    data[place] ^= 1
    path.write_bytes(data)
    opened = Container.open(path)
    assert opened.tensor("a").sum() == 15
    with pytest.raises(UserError, match="b:codes was altered"):
        opened.tensor("b", "codes")
    with pytest.raises(UserError, match="it has no c"):
        opened.tensor("c")


def test_other_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UserError, match=r"cannot read .*none\.cllm"):
        Container.open(tmp_path / "none.cllm")
    save_file({"a": torch.ones(2)}, tmp_path / "other.cllm")
    with pytest.raises(UserError, match="no compressed model of cllm"):
        Container.open(tmp_path / "other.cllm")
    monkeypatch.setattr(container, "VERSION", 2)
    make(tmp_path / "newer.cllm")
    monkeypatch.undo()
    with pytest.raises(UserError, match="version 2, and this cllm reads up to 1"):
        Container.open(tmp_path / "newer.cllm")
    assert container.is_container(tmp_path / "none.cllm")
    assert not container.is_container(tmp_path)


@given(bits=st.sampled_from([2, 3, 4, 8]), count=st.integers(0, 50), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_codes_come_back_from_as_few_bytes_as_they_take(bits: int, count: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << bits, count))
    packed = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(packed, bits, count).long(), codes)
    per = {2: 4, 3: 8, 4: 2, 8: 1}[bits]
    assert len(packed) == -(-count // per) * per * bits // 8
    with pytest.raises(ValueError, match="do not hold"):
        unpack_codes(packed, bits, count + per)


@given(bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(0, 4), columns=st.integers(0, 20))
@settings(max_examples=60)
def test_each_row_of_codes_begins_at_a_byte(bits: int, rows: int, columns: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << bits, (rows, columns)))
    packed = pack_rows(codes, bits)
    for row, line in zip(codes, packed, strict=True):
        assert torch.equal(line, pack_codes(row, bits))
    assert torch.equal(unpack_rows(packed, bits, columns).long(), codes)
    with pytest.raises(ValueError, match="do not hold"):
        unpack_rows(packed, bits, columns + 8)
    with pytest.raises(ValueError, match="do not hold"):
        unpack_rows(packed.reshape(-1), bits, columns)


@pytest.mark.parametrize(("kind", "low", "high"), [("q4_0", -8, 7), ("q8_0", -127, 127)])
def test_blocks_are_llama_cpps_bit_for_bit(kind: str, low: int, high: int) -> None:
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(low, high + 1, (3, 96)))
    scale = torch.from_numpy(rng.normal(size=(3, 3)).astype(np.float16))
    blocks = {"q4_0": q4_0_blocks, "q8_0": q8_0_blocks}[kind](codes, scale)
    # However the numbers lie in memory.
    turned = (tensor.T.contiguous().T for tensor in (codes, scale))
    assert torch.equal({"q4_0": q4_0_blocks, "q8_0": q8_0_blocks}[kind](*turned), blocks)
    found, scales = read_blocks(blocks, f"gguf-{kind}")
    assert torch.equal(found.long(), codes)
    assert torch.equal(scales, scale)
    theirs = gguf.quants.dequantize(
        blocks.numpy(), getattr(gguf.GGMLQuantizationType, kind.upper())
    )
    ours = GridMatrix(codes=found, scale=scales, offset=None, group=32, bits=int(kind[1])).dense()
    assert np.array_equal(ours.numpy(), theirs)
    with pytest.raises(ValueError, match="whole blocks"):
        read_blocks(blocks[:, :-1], f"gguf-{kind}")


def test_a_matrix_on_a_grid_is_dense_and_packed_as_it_says() -> None:
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(-8, 8, (3, 13)).astype(np.int8))
    scale, offset = (torch.from_numpy(rng.normal(size=(3, 4)).astype(np.float16)) for _ in "so")
    matrix = GridMatrix(codes=codes, scale=scale, offset=offset, group=4, bits=4)
    group = torch.arange(13) // 4
    wanted = offset.float()[:, group] + scale.float()[:, group] * codes.float()
    assert torch.equal(matrix.dense(), wanted)
    assert torch.equal(matrix.dense(torch.bfloat16), wanted.bfloat16())
    packed = matrix.packed_int4()
    assert packed.shape == (3, 7)
    both = torch.stack([packed & 15, packed >> 4], dim=2).view(3, 14)[:, :13]
    assert torch.equal(both.to(torch.int8) - 8, codes)
    with pytest.raises(ValueError, match="8 bits"):
        GridMatrix(codes=codes, scale=scale, offset=None, group=4, bits=8).packed_int4()
