"""The tokenizer loses nothing, makes no special token by accident, and refuses files that would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from cllm.core.errors import UsageError, UserError
from cllm.text.facts import tokenizer_facts
from cllm.text.lossless import byte_of_character
from cllm.text.tokenizer import END_TOKEN, Tokenizer, segments

TRICKY = st.one_of(
    st.text(),
    st.text(alphabet=" \t\r\n\u2028\u00a0a'ls<|>é日\U0001f600\x00\ufeff"),
    st.just(END_TOKEN),
    st.just("<|pad|>"),
)


@given(st.lists(TRICKY, max_size=6).map("".join))
@settings(deadline=None)
def test_text_round_trips_without_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode_bytes(ids) == text.encode("utf-8")
    assert tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & tokenizer.special_ids


@given(st.one_of(st.binary(), st.lists(st.sampled_from([b"\xff", b"\xe6\x97", b"ab ", b"\xc3\xa9"]))
       .map(b"".join)))  # fmt: skip
@settings(deadline=None)
def test_any_bytes_round_trip(tokenizer: Tokenizer, data: bytes) -> None:
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert not set(ids.tolist()) & tokenizer.special_ids


@given(TRICKY, TRICKY, TRICKY)
@settings(deadline=None)
def test_spans_are_whole_tokens(tokenizer: Tokenizer, a: str, b: str, c: str) -> None:
    ids, mask = tokenizer.encode_with_spans(a + b + c, [(len(a), len(a + b))])
    assert tokenizer.decode_bytes(ids) == (a + b + c).encode("utf-8")
    assert tokenizer.decode_bytes(ids[mask]) == b.encode("utf-8")
    np.testing.assert_array_equal(ids[mask], tokenizer.encode(b))


def test_segments_cover_the_range() -> None:
    assert list(segments(9, [(0, 2), (2, 2), (4, 6)])) == [
        (0, 2, True),
        (2, 4, False),
        (4, 6, True),
        (6, 9, False),
    ]


def test_pre_tokenizer_is_gpt2s(tokenizer: Tokenizer) -> None:
    step = json.loads(tokenizer.to_json())["pre_tokenizer"]
    assert step["type"] == "ByteLevel"
    assert step["use_regex"]
    assert not step["add_prefix_space"]
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str("I'll  say 42x!!\n\nno")
    words = ["I", "'ll", "Ġ", "Ġsay", "Ġ42", "x", "!!", "Ċ", "Ċ", "no"]
    assert [word for word, _ in cut] == words


def test_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_id == 0
    assert tokenizer.special_tokens() == {END_TOKEN: 0, "<|pad|>": 1}
    assert tokenizer.vocab_size == 350
    assert tokenizer.token_bytes(0) == b""
    assert tokenizer.decode([0, *tokenizer.encode("a"), 1]) == "a"
    assert {tokenizer.token_bytes(i) for i in range(350)} >= {bytes([b]) for b in range(256)}
    assert len(byte_of_character()) == 256
    assert set(byte_of_character()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_small_text_gives_a_smaller_vocabulary() -> None:
    small = Tokenizer.train(["ab ab", "x"], 1000)
    assert small.vocab_size == 258  # the bytes, the end token, "ab": " ab" occurs once


@pytest.mark.parametrize(
    ("size", "special", "message"),
    [(257, ["<|a|>"], "at least 258"), (300, ["<|a|>", "<|a|>"], "repeated"), (300, [""], "empty")],
)
def test_training_refuses(size: int, special: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Tokenizer.train(["text"], size, special)


def test_training_is_deterministic_between_processes() -> None:
    program = (
        "import sys, json; from cllm.text.tokenizer import Tokenizer;"
        "print(Tokenizer.train(reversed(json.load(sys.stdin)), 400, ['<|pad|>']).sha256)"
    )
    sentences = json.dumps(_sentences() * 20)
    done = subprocess.run(
        [sys.executable, "-c", program], input=sentences, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == Tokenizer.train(_sentences() * 20, 400, ["<|pad|>"]).sha256


def _sentences() -> list[str]:
    return [f"{a} {b} {a}{b}" for a in ("the", "them", "hat", "at") for b in ("eat", "tea", "ate")]


def test_file_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = Tokenizer.load(path)
    assert again.sha256 == tokenizer.sha256
    assert again.to_json().encode("utf-8") == path.read_bytes()
    text = f"naïve {END_TOKEN} text"
    np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


def _byte_level(**changes: object) -> tokenizers.Tokenizer:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


def test_other_byte_level_tokenizers_are_taken() -> None:
    split = pre_tokenizers.Split(tokenizers.Regex(r"\s+|\S+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = _byte_level(pre_tokenizer=pre_tokenizers.Sequence([split, level]))
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["hello"])
    backend.enable_truncation(4)
    taken = Tokenizer(backend)
    assert taken.end_id == 256
    ids = taken.encode("hello world </s>")
    assert taken.token_bytes(int(ids[0])) == b"hello"
    assert taken.decode(ids) == "hello world </s>"


def _lossy() -> dict[str, tuple[tokenizers.Tokenizer, str]]:
    spaced = _byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    dropping = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    stripping = _byte_level()
    stripping.add_special_tokens([tokenizers.AddedToken(END_TOKEN, lstrip=True)])
    missing = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    missing.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "prefix": (spaced, "adds a space"),
        "normalizer": (_byte_level(normalizer=normalizers.Lowercase()), "normalises"),
        "whitespace": (_byte_level(pre_tokenizer=dropping), "WhitespaceSplit"),
        "strip": (stripping, "strips the space"),
        "bytes": (missing, "255 of the 256 bytes"),
        "words": (tokenizers.Tokenizer(models.WordLevel({"a": 0})), "WordLevel"),
        "no step": (tokenizers.Tokenizer(models.BPE()), "not byte-level"),
        "no end": (_byte_level(), "no end token"),
    }


@pytest.mark.parametrize("case", list(_lossy()))
def test_lossy_files_are_refused(case: str, tmp_path: Path) -> None:
    backend, message = _lossy()[case]
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model": 3}', encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")


def test_lone_surrogate_is_the_users_to_mend(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_facts(tokenizer: Tokenizer) -> None:
    facts = tokenizer_facts(tokenizer, "the the 日", shown=2)
    assert facts.vocab_size == 350
    assert facts.merges == 350 - 256 - 2
    assert facts.text_bytes == 11
    assert facts.text_tokens == len(tokenizer.encode("the the 日"))
    assert facts.bytes_per_token == pytest.approx(11 / facts.text_tokens)
    first = tokenizer.encode("the the 日")[:2]
    assert facts.pieces == tuple(repr(tokenizer.decode([i])) for i in first)
    lengths = [len(tokenizer.token_bytes(i)) for i in range(2, 350)]
    assert facts.mean_bytes == pytest.approx(np.mean(lengths))
    assert len(eval(facts.longest[0]).encode("utf-8")) == max(lengths)
