"""Words of one key are variants; words with a known ending come from shorter ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cllm.text.merge_tree import MergeTree
from cllm.text.morphology import Morphology, ancestors, find_endings, find_parents, word_key

VERBS = ["play", "walk", "talk", "jump", "help", "work", "make", "happy", "run"]
FORMS = [verb + ending for verb in VERBS[:6] for ending in ("", "s", "ed", "ing", "er", "ers")]


def test_keys() -> None:
    assert {word_key(text) for text in ("run", " run", "Run", " RUN")} == {"run"}
    assert word_key("  run") == " run"
    assert word_key(" ") == ""


def test_endings_are_what_enough_words_have() -> None:
    endings = find_endings({*FORMS, "helpless"})
    assert {"s", "ed", "ing", "er", "ers"} <= endings
    assert "less" not in endings


def test_spelling_changes_are_seen() -> None:
    words = {*FORMS, *VERBS, "making", "running", "runner", "happier"}
    parents = find_parents(words, find_endings(words))
    assert parents["making"] == "make"
    assert parents["running"] == parents["runner"] == "run"
    assert parents["happier"] == "happy"
    assert parents["walkers"] == "walker"
    assert list(ancestors("walkers", parents)) == ["walker", "walk"]
    assert "walk" not in parents


def test_stems_that_are_no_words() -> None:
    words = {*FORMS, "founded", "founding", "raised"}
    parents = find_parents(words, find_endings(words))
    assert parents["founded"] == parents["founding"] == "found"
    assert "raised" not in parents, "alone it shares no stem"


@given(st.sets(st.text("abe", min_size=3, max_size=9), max_size=60), st.integers(0, 3))
def test_lines_of_descent_end(words: set[str], least: int) -> None:
    endings = {word[-n:] for word in words for n in range(1, 4)} if least else find_endings(words)
    parents = find_parents(words, endings)
    for word in words:
        line = list(ancestors(word, parents))
        assert all(
            a > b for a, b in zip([len(word), *map(len, line)], map(len, line), strict=False)
        )


def test_of_a_vocabulary() -> None:
    texts = [f" {form}" for form in FORMS] + ["Play", "play", ",", " ,", "Ed"]
    letters = sorted({c for text in texts for c in text if text != c})
    vocab = dict.fromkeys([*letters, "pl", *texts])
    ids = {name: i for i, name in enumerate(vocab)}
    model = {"type": "BPE", "vocab": ids, "merges": [["p", "l"]]}
    tree = MergeTree.from_tokenizer({"model": model})
    words = Morphology.of(tree)
    assert words.variants["play"] == tuple(sorted(ids[t] for t in ("play", "Play", " play")))
    assert set(words.variants[","]) == {ids[","], ids[" ,"]}
    family = {ids[t] for t in ids if t.strip().lower().startswith("play")}
    assert set(words.relatives["play"]) == family
    assert set(words.relatives["player"]) == {ids[" player"], ids[" players"]}
    assert words.keys[ids["Ed"]] == "ed"
    assert words.models[ids[" play"]] == (ids["play"],), "the shortest, in lower case"
    assert words.models[ids["play"]] == ()
    assert words.models[ids[" players"]] == (ids[" player"], ids["play"])
    alone = Morphology.of(tree, stems=False)
    assert alone.variants == words.variants
    assert not alone.parents
    assert alone.models[ids[" players"]] == ()


def test_no_model_is_longer_than_its_token() -> None:
    vocab = ["s", "ss", " ss", "ß"]  # ß folds to ss, which has as many bytes
    found = {"type": "BPE", "vocab": {n: i for i, n in enumerate(vocab)}, "merges": [["s", "s"]]}
    words = Morphology.of(MergeTree.from_tokenizer({"model": found}))
    assert words.models == ((), (), (1,), (1,))
