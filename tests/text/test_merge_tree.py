"""The merge tree of any BPE tokenizer file: what each token was merged from, and what it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from cllm.text.merge_tree import MergeTree
from cllm.text.tokenizer import Tokenizer


def description(vocab: list[str], merges: list[Any], **model: Any) -> dict[str, Any]:
    """A parsed ``tokenizer.json`` of characters."""
    ids = {name: i for i, name in enumerate(vocab)}
    return {"model": {"type": "BPE", "vocab": ids, "merges": merges, **model}, "added_tokens": []}


def test_every_token_is_the_join_of_its_parts(tokenizer: Tokenizer) -> None:
    tree = MergeTree.from_tokenizer(tokenizer)
    assert len(tree) == tokenizer.vocab_size
    merged = [i for i in range(len(tree)) if tree.parts[i, 0] >= 0]
    assert len(merged) == len(tokenizer.merges())
    for i in merged:
        left, right = tree.parts[i].tolist()
        assert tree.texts[i] == tree.texts[left] + tree.texts[right]
        assert tokenizer.merges()[tree.ranks[i]] == (tree.names[left], tree.names[right])
    assert list(tree.texts) == [tokenizer.token_bytes(i) for i in range(len(tree))]
    assert tree.special == tokenizer.special_ids


def test_contents_count_what_is_in_the_tree(tokenizer: Tokenizer) -> None:
    tree = MergeTree.from_tokenizer(tokenizer)
    contents = tree.contents().toarray()

    def count(token: int) -> np.ndarray:
        found = np.zeros(len(tree), dtype=np.int64)
        found[token] = 1
        for part in tree.parts[token].tolist():
            if part >= 0:
                found += count(part)
        return found

    np.testing.assert_array_equal(contents, [count(i) for i in range(len(tree))])


def test_a_file_gives_the_same_however_it_is_laid_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = MergeTree.from_tokenizer(tokenizer)
    parsed = json.loads(tokenizer.to_json())
    parsed["model"]["merges"] = [" ".join(pair) for pair in tokenizer.merges()]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(parsed), encoding="utf-8")
    theirs = MergeTree.from_tokenizer(path)
    assert theirs.sha256 == ours.sha256 == MergeTree.from_tokenizer(parsed).sha256
    np.testing.assert_array_equal(theirs.parts, ours.parts)
    parsed["model"]["merges"].pop()
    assert MergeTree.from_tokenizer(parsed).sha256 != ours.sha256


def test_metaspace_and_byte_fallback() -> None:
    vocab = ["<unk>", "<0xE2>", "▁", "r", "u", "n", "▁r", "un", "▁run"]
    found = description(vocab, [["▁", "r"], ["u", "n"], ["▁r", "un"]], byte_fallback=True)
    found["decoder"] = {"type": "Metaspace", "replacement": "▁"}
    tree = MergeTree.from_tokenizer(found)
    assert tree.texts[1] == b"\xe2"
    assert tree.text(1) is None
    assert tree.text(8) == " run"
    assert tree.parts[8].tolist() == [6, 7]


def test_marks_of_continuing_and_last_subwords_are_no_text() -> None:
    vocab = ["a", "##b", "##c</w>", "ab", "abc</w>"]
    found = description(
        vocab,
        [["a", "##b"], ["ab", "##c</w>"]],
        continuing_subword_prefix="##",
        end_of_word_suffix="</w>",
    )
    tree = MergeTree.from_tokenizer(found)
    assert [tree.text(i) for i in range(5)] == ["a", "b", "c", "ab", "abc"]
    assert tree.parts.tolist()[3:] == [[0, 1], [3, 2]]


def test_the_first_of_several_merges_counts() -> None:
    vocab = ["a", "b", "c", "ab", "bc", "abc"]
    merges = [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]]
    tree = MergeTree.from_tokenizer(description(vocab, merges))
    assert tree.parts[5].tolist() == [0, 4]
    assert tree.ranks.tolist() == [-1, -1, -1, 0, 1, 2]


def test_added_tokens_are_leaves_and_gaps_are_empty() -> None:
    found = description(["a", "b", "ab"], [["a", "b"]])
    found["added_tokens"] = [
        {"id": 2, "content": "ab", "special": False},
        {"id": 5, "content": "<end>", "special": True},
    ]
    tree = MergeTree.from_tokenizer(found)
    assert tree.names == ("a", "b", "ab", "", "", "<end>")
    assert tree.texts == (b"a", b"b", b"ab", b"", b"", b"")
    assert (tree.parts == -1).all()


def test_libraries_own_files_are_read(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=40, show_progress=False)
    backend.train_from_iterator(["run runs running"] * 9, trainer=trainer)
    backend.save(str(tmp_path / "t.json"))
    tree = MergeTree.from_tokenizer(tmp_path / "t.json")
    assert " run" in [tree.text(i) for i in range(len(tree))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merges": []}, "no merge list"),
        ({"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]], "merges": None}, "Unigram"),
        ({"type": "WordPiece", "merges": None}, "WordPiece"),
        ({"vocab": {"a": 0}, "merges": []}, "vocabulary of 1"),
        ({"vocab": {}, "merges": []}, "vocabulary of 0"),
        ({"merges": [["a", "c"]]}, "'c'"),
        ({"merges": ["ab"]}, "no pair"),
        ({"merges": [["", "a"]]}, "no pair"),
        ({"merges": [3]}, "no pair"),
        ({"merges": [["a", 3]]}, "no pair"),
        ({"merges": {"a": "b"}}, "no merge list"),
        ({"vocab": {"a": 0, "b": "1", "ab": 2}}, "no id of 'b'"),
        ({"vocab": {"a": 0, "b": -1, "ab": 2}}, "no id of 'b'"),
        ({"vocab": None}, r"not a tokenizer\.json"),
    ],
)
def test_what_has_no_merge_tree_is_refused(change: dict[str, Any], message: str) -> None:
    found = description(["a", "b", "ab"], [["a", "b"]])
    found["model"] |= change
    with pytest.raises(ValueError, match=message):
        MergeTree.from_tokenizer(found)


@pytest.mark.parametrize("token", [3, {"id": -1, "content": "<end>"}, {"id": 3}, {"content": "x"}])
def test_what_is_no_added_token_is_refused(token: Any) -> None:
    found = description(["a", "b", "ab"], [["a", "b"]]) | {"added_tokens": [token]}
    with pytest.raises(ValueError, match="no added token; download it anew"):
        MergeTree.from_tokenizer(found)


def test_an_added_token_is_not_special_unless_it_says_so() -> None:
    found = description(["a", "b", "ab"], [["a", "b"]])
    plain = MergeTree.from_tokenizer(found | {"added_tokens": [{"id": 3, "content": "x"}]})
    assert (plain.texts[3], plain.special) == (b"x", frozenset())
    said = {"id": 3, "content": "x", "special": False}
    assert MergeTree.from_tokenizer(found | {"added_tokens": [said]}).sha256 == plain.sha256


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json"):
        MergeTree.from_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json"):
        MergeTree.from_tokenizer(tmp_path / "bad.json")
