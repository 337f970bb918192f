"""``gguf``: llama.cpp (where it is installed) and a reading of our own give the same logits and tokens."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cllm.core.errors import UserError
from cllm.export import gguf_blocks
from cllm.export.check import CheckFailedError, check, random_texts
from cllm.export.gguf import KINDS, open_runtime, write_blocks
from cllm.export.gguf_blocks import Stored, pack_q4_0, pack_q8_0, store
from cllm.export.gguf_reading import read_back
from cllm.export.llama_cpp import IllegalInstructionError, open_llama_cpp
from cllm.export.runtime import Runtime
from cllm.export.source import Source
from cllm.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

SourceOf = Callable[..., Source]
Exported = Callable[..., tuple[Path, Any]]


def llama_cpp(path: Path) -> Runtime:
    """The file in llama.cpp; the test is skipped where that is not installed, or ends alone."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is built from source, by hand")
    try:
        return open_llama_cpp(path)
    except IllegalInstructionError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[read_back, llama_cpp], ids=["read back", "llama.cpp"])
def opened(request: pytest.FixtureRequest) -> Callable[[Path], Runtime]:
    """Opens a file in each of the two."""
    opener: Callable[[Path], Runtime] = request.param
    return opener


def test_each_kind_of_model_is_held_or_refused(
    kind: str,
    source_of: SourceOf,
    exported: Exported,
    refused: dict[str, set[str]],
    opened: Callable[[Path], Runtime],
) -> None:
    source = source_of(kind)
    if kind in refused["gguf"]:
        with pytest.raises(UserError, match=r"gguf \(llama.cpp\) cannot hold model\..*: .*export"):
            exported(source, "gguf")
        return
    path, _ = exported(source, "gguf")
    # Against the model itself, whose table is not worked out.
    found = check(opened(path), source.model, source)
    assert found.difference <= 1e-4
    assert found.texts > 0


@pytest.mark.parametrize("dtype", KINDS)
def test_each_precision_is_what_was_stored(
    dtype: str, source_of: SourceOf, exported: Exported, opened: Callable[[Path], Runtime]
) -> None:
    source = source_of("grouped")
    path, model = exported(source, "gguf", dtype)
    runtime = opened(path)
    check(runtime, model, source)
    if dtype != "f32" and runtime.exact:
        with pytest.raises(CheckFailedError):
            check(runtime, source.model, source)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == {"F32", *KINDS[dtype][:2]}


def test_a_llama_cpp_that_ends_is_told_of_and_the_file_read_back(
    source_of: SourceOf,
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = source_of()
    path, model = exported(source, "gguf")
    (tmp_path / "alone.py").write_text("import os; os.kill(os.getpid(), 4)")
    monkeypatch.setattr("cllm.export.llama_cpp.ALONE", tmp_path / "alone.py")
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(__version__="0.0"))
    runtime = open_runtime(path)
    assert "llama-cpp-python 0.0) ends by SIGILL on this machine" in runtime.name
    assert check(runtime, model, source).difference <= 1e-4


def test_a_file_that_ends_llama_cpp_is_refused(
    source_of: SourceOf,
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, _ = exported(source_of(), "gguf")
    program = "import os, sys; print('assert failed', file=sys.stderr, flush=True); os.abort()"
    (tmp_path / "alone.py").write_text(program)
    monkeypatch.setattr("cllm.export.llama_cpp.ALONE", tmp_path / "alone.py")
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(__version__="0.0"))
    with pytest.raises(UserError, match=r"ends by SIGABRT over .*: assert failed"):
        open_runtime(path)


def test_a_wrong_order_of_rows_fails_the_check(
    source_of: SourceOf,
    exported: Exported,
    monkeypatch: pytest.MonkeyPatch,
    opened: Callable[[Path], Runtime],
) -> None:
    source = source_of()
    monkeypatch.setattr("cllm.export.gguf.neighbours", lambda rows, head_dim: rows)
    path, model = exported(source, "gguf")
    with pytest.raises(CheckFailedError, match="logits differ"):
        check(opened(path), model, source)


def test_greedy_tokens_of_50_prompts_are_ours(source_of: SourceOf, exported: Exported) -> None:
    from cllm.infer.generate import generate
    from cllm.infer.sampling import Sampling

    source = source_of()
    path, _ = exported(source, "gguf")
    runtime = llama_cpp(path)
    compared = 0
    for text in random_texts(source, 50, seed=3):
        ids = [source.tokenizer.end_id, *map(int, source.tokenizer.encode(text))][:12]
        new = source.config.context - len(ids)
        ours = generate(source.model, ids, Sampling(max_tokens=new, temperature=0))
        theirs = list(ids)
        for number, token in enumerate(ours):
            scores = runtime.logits(np.array([theirs]))[0, -1]
            second, best = np.sort(scores)[-2:]
            if best - second < 1e-3:
                break
            assert int(scores.argmax()) == token, (text, number)
            theirs.append(token)
            compared += 1
    assert compared > 50 * 8


def test_tokens_of_1000_random_texts_are_the_same(
    source_of: SourceOf, exported: Exported, opened: Callable[[Path], Runtime]
) -> None:
    source = source_of()
    path, _ = exported(source, "gguf")
    encode = opened(path).encode
    assert encode is not None
    for text in random_texts(source, 1000, seed=5):
        ours = [source.tokenizer.end_id, *source.tokenizer.encode(text).tolist()]
        assert list(encode(text)) == ours, text


def test_any_assigned_text_is_cut_alike(
    source_of: SourceOf, exported: Exported, opened: Callable[[Path], Runtime]
) -> None:
    # Other than the checks' own texts: characters of all scripts beside each other. llama.cpp's tables
    # are of Unicode 15, so that characters newer than that may be cut otherwise (docs/export.md).
    assert float(unicodedata.unidata_version.rsplit(".", 1)[0]) < 16
    letters = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    rng = random.Random(2)
    texts = [
        "".join(
            rng.choice(letters) if rng.random() < 0.6 else rng.choice(" \n'a1.s") for _ in range(30)
        )
        for _ in range(300)
    ]
    source = source_of_tokenizer(source_of, Tokenizer.train(texts * 2, 3000))
    path, _ = exported(source, "gguf")
    encode = opened(path).encode
    assert encode is not None
    for text in texts:
        assert list(encode(text))[1:] == source.tokenizer.encode(text).tolist(), text


def source_of_tokenizer(source_of: SourceOf, tokenizer: Tokenizer) -> Source:
    """A model for another tokenizer."""
    source = source_of(vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(source, tokenizer=tokenizer)


def test_special_tokens_in_text_stay_text(
    source_of: SourceOf, exported: Exported, opened: Callable[[Path], Runtime]
) -> None:
    source = source_of()
    path, _ = exported(source, "gguf")
    encode = opened(path).encode
    assert encode is not None
    assert encode("a<|endoftext|>").count(source.tokenizer.end_id) == 1


def test_rows_beyond_the_tokenizer_are_unused(
    tokenizer: Tokenizer, source_of: SourceOf, exported: Exported, opened: Any
) -> None:
    source = source_of(vocab_size=tokenizer.vocab_size + 9)
    path, _ = exported(source, "gguf")
    check(opened(path), source.model, source)


def test_pre_tokenizers_that_llama_cpp_does_not_have_are_refused(
    source_of: SourceOf, exported: Exported
) -> None:
    source = source_of()
    description = json.loads(source.tokenizer.to_json())
    digits = {"type": "Digits", "individual_digits": True}
    given = description["pre_tokenizer"]
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, given]}
    other = Tokenizer.from_json(json.dumps(description))
    with pytest.raises(UserError, match=r"gguf cannot hold this tokenizer: .*Digits, ByteLevel"):
        exported(dataclasses.replace(source, tokenizer=other), "gguf")


def test_widths_that_blocks_do_not_divide_are_refused(
    source_of: SourceOf, exported: Exported
) -> None:
    source = source_of(d_ff=100)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.out\.weight as Q8_0.*100 numbers"):
        exported(source, "gguf", "q8_0")
    exported(source, "gguf", "f16")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_packing_is_the_layout_of_ggml(kind: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((6, 96)).astype(np.float32)
    reference = store(values, kind, "w")
    blocks = reference.data.reshape(6, 3, -1)
    scales = blocks[:, :, :2].copy().view(np.float16).astype(np.float32)[:, :, 0]
    integers = np.rint(reference.values().reshape(6, 3, 32) / scales[:, :, None]).astype(int)
    pack = {"Q8_0": pack_q8_0, "Q4_0": pack_q4_0}[kind]
    made = pack(integers.reshape(6, 96), scales)
    np.testing.assert_array_equal(made.data, reference.data)
    with pytest.raises(ValueError, match="integers must be from"):
        pack(integers.reshape(6, 96) + 300, scales)
    with pytest.raises(ValueError, match="do not fit"):
        pack(integers.reshape(6, 96), scales[:, :2])


def test_blocks_that_a_decoder_chose_are_what_the_file_holds(
    source_of: SourceOf, tmp_path: Path, opened: Callable[[Path], Runtime]
) -> None:
    source = source_of("grouped")
    rng = np.random.default_rng(1)
    chosen: dict[str, Stored] = {}
    for name in ("layers.0.attention.qkv.weight", "layers.1.mlp.gate_up.weight"):
        rows, columns = source.model.get_parameter(name).shape
        integers = rng.integers(-8, 8, (rows, columns))
        scales = rng.uniform(0.02, 0.04, (rows, columns // 32))
        chosen[name] = pack_q4_0(integers, scales)
    model = write_blocks(source, "q4_0", tmp_path / "x.gguf", chosen)
    for name, stored in chosen.items():
        np.testing.assert_array_equal(model.get_parameter(name).detach(), stored.values())
    check(opened(tmp_path / "x.gguf"), model, source)


def test_chosen_blocks_must_fit(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of()
    block = pack_q4_0(np.zeros((2, 64), int), np.ones((2, 2)))
    with pytest.raises(ValueError, match="has shape"):
        write_blocks(source, "q4_0", tmp_path / "x", {"layers.0.mlp.out.weight": block})
    with pytest.raises(ValueError, match="no weight 'nope'"):
        write_blocks(source, "q4_0", tmp_path / "x", {"nope": block})


def test_a_truncated_file_is_one_line(
    source_of: SourceOf, exported: Exported, opened: Callable[[Path], Runtime]
) -> None:
    path, _ = exported(source_of(), "gguf")
    whole = path.read_bytes()
    for size in (len(whole) - 100, 1000, 5):
        path.write_bytes(whole[:size])
        with pytest.raises(
            UserError, match=r"is no whole GGUF file.*cut short or altered"
        ) as caught:
            opened(path)
        assert "reshape" not in str(caught.value)


def test_half_precision_overflow_is_named() -> None:
    with pytest.raises(UserError, match="w leaves the range of F16"):
        gguf_blocks.store(np.full((2, 32), 1e6, np.float32), "F16", "w")
