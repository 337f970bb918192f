"""Codes are unique products of primes, and similar where pieces are shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.lattice import is_prime
from cllm.lattice.similarity import bits
from cllm.text.code_file import FORMAT, load_codes, save_codes
from cllm.text.merge_tree import MergeTree
from cllm.text.morphology import Morphology
from cllm.text.token_codes import Kind, TokenCodes
from cllm.text.tokenizer import Tokenizer

VERBS = ["play", "walk", "help", "work", "jump"]
WORDS = " ".join(
    ["run Run running Running runner runs"]
    + [verb + ending for verb in VERBS for ending in ("", "s", "ing", "er")]
)


@st.composite
def trees(draw: st.DrawFn) -> MergeTree:
    """Random BPEs: each merge joins any two tokens there are, by letters of three cases and a space."""
    vocab = list(" abAB")
    merges = []
    for _ in range(draw(st.integers(1, 25))):
        left, right = draw(st.sampled_from(vocab)), draw(st.sampled_from(vocab))
        if left + right not in vocab and len(left + right) < 40:
            vocab.append(left + right)
            merges.append([left, right])
    merges = merges or [["a", "b"]]
    ids = {name: i for i, name in enumerate([*vocab, *([] if "ab" in vocab else ["ab"])])}
    end = {"id": len(ids), "content": "<end>", "special": True}
    model = {"type": "BPE", "vocab": ids, "merges": merges}
    return MergeTree.from_tokenizer({"model": model, "added_tokens": [end]})


@settings(max_examples=60)
@given(trees(), st.randoms(use_true_random=False), st.booleans())
def test_codes_of_random_tokenizers(tree: MergeTree, random: Any, counted: bool) -> None:
    counts = np.array([random.randrange(50) for _ in range(len(tree))]) if counted else None
    words = Morphology.of(tree)
    codes = TokenCodes.build(tree, counts, words)
    integers = codes.codes.integers()
    assert len(set(integers)) == len(tree), "unique"
    assert len(set(codes.primes.tolist())) == len(codes.labels)
    assert all(is_prime(p) for p in codes.primes)
    exponents = codes.exponents().toarray()
    for token in range(len(tree)):
        factors = {piece: e for piece, _, e in codes.factors(token)}
        assert factors == {p: e for p, e in enumerate(exponents[token]) if e}
    alone = TokenCodes.build(tree, counts, Morphology(words.keys, {}, {}, {}, ()))
    parts = alone.codes.integers()
    for token, value in enumerate(parts):
        left, right = tree.parts[token].tolist()
        product = parts[left] * parts[right] if left >= 0 else 1
        assert value == int(alone.primes[token]) * product
    for token, models in enumerate(words.models):
        for model in models:
            assert integers[token] % integers[model] == 0
            assert integers[token] != integers[model]
    near = codes.similarities(np.arange(len(tree)))
    np.testing.assert_array_equal(near, near.T)
    assert ((near == 1) == np.eye(len(tree), dtype=bool)).all()
    assert not near[len(tree) - 1, :-1].any(), "a special token shares nothing"
    for ids in words.variants.values():
        assert (near[np.ix_(ids, ids)] > 0).all()
        pieces = [set(codes.codes[i]) for i in ids]
        assert set.intersection(*pieces) - set(codes.primes[: len(tree)].tolist())
    matrix = codes.incidence()
    np.testing.assert_array_equal(matrix.getnnz(axis=1), np.diff(codes.codes.offsets))


@pytest.fixture(scope="module")
def english() -> tuple[Tokenizer, TokenCodes]:
    text = (WORDS + ". ") * 30
    tokenizer = Tokenizer.train([text], 420)
    tree = MergeTree.from_tokenizer(tokenizer)
    ids = tokenizer.encode(text)
    return tokenizer, TokenCodes.build(tree, np.bincount(ids, minlength=len(tree)))


def only(tokenizer: Tokenizer, text: str) -> int:
    """The token that ``text`` is."""
    (token,) = tokenizer.encode(text)
    return int(token)


def test_primes_rise_as_frequency_falls(english: tuple[Tokenizer, TokenCodes]) -> None:
    tokenizer, codes = english
    contents = codes.incidence()
    frequency = contents.T @ codes.counts
    order = np.argsort(codes.primes)
    assert (np.diff(frequency[order]) <= 0).all()
    assert codes.primes[only(tokenizer, " ")] == 2
    np.testing.assert_allclose(codes.information, np.log2(codes.primes))


def test_relatives_share_their_stem(english: tuple[Tokenizer, TokenCodes]) -> None:
    tokenizer, codes = english
    run, running, runner = (only(tokenizer, word) for word in (" run", " running", " runner"))
    root = codes.root([run, running, runner])
    assert root is not None
    assert codes.labels[root] in ("run", "' run'")
    ids, scores = codes.similar([run], 8)
    assert {running, runner, only(tokenizer, " runs")} <= set(ids[0].tolist())
    assert (np.diff(scores) <= 0).all()
    assert run not in ids
    alone = codes.root([running])
    assert alone is not None
    assert codes.describe(alone) == "stem run"


def test_variants_share_a_piece_that_is_no_token(english: tuple[Tokenizer, TokenCodes]) -> None:
    tokenizer, codes = english
    root = codes.root([only(tokenizer, " Run"), only(tokenizer, " run")])
    assert root is not None
    assert codes.kinds[root] in (Kind.VARIANTS, Kind.STEM)


def test_a_root_of_strangers_is_none(english: tuple[Tokenizer, TokenCodes]) -> None:
    tokenizer, codes = english
    assert codes.root([tokenizer.end_id, only(tokenizer, "!")]) is None
    assert codes.root([tokenizer.end_id]) == tokenizer.end_id
    with pytest.raises(ValueError, match="at least one"):
        codes.root([])


def test_factors_multiply_to_the_code(english: tuple[Tokenizer, TokenCodes]) -> None:
    tokenizer, codes = english
    token = only(tokenizer, " running")
    factors = codes.factors(token)
    product = 1
    for piece, prime, exponent in factors:
        assert codes.primes[piece] == prime
        product *= prime**exponent
    assert product == codes.codes.integers()[token]
    assert np.log2(float(product)) == pytest.approx(bits(codes.codes)[token])
    assert [prime for _, prime, _ in factors] == sorted((p for _, p, _ in factors), reverse=True)
    n = only(tokenizer, "n")
    assert {piece: e for piece, _, e in factors}[n] == 3, "n, n and n"


def test_incidence_can_be_made_smaller(english: tuple[Tokenizer, TokenCodes]) -> None:
    _, codes = english
    whole = codes.incidence()
    assert whole.shape == (len(codes), len(codes.primes))
    assert whole.dtype == np.float32
    assert set(whole.data.tolist()) == {1.0}
    assert (whole.diagonal() == 1).all()
    others = codes.incidence(own=False)
    alone = whole.getnnz(axis=1) == 1
    assert (others.getnnz(axis=1)[~alone] == whole.getnnz(axis=1)[~alone] - 1).all()
    assert (others.getnnz(axis=1)[alone] == 1).all()
    few = codes.incidence(max_pieces=40)
    assert few.getnnz(axis=1).min() >= 1
    assert few.getnnz(axis=0).min() >= 1
    assert few.shape[1] < whole.shape[1]
    assert codes.incidence(max_pieces=10**9).shape == whole.shape
    frequent = codes.primes <= np.sort(codes.primes)[39]
    kept = whole[:, frequent].getnnz(axis=1)
    np.testing.assert_array_equal(few.getnnz(axis=1), np.maximum(kept, 1))
    with pytest.raises(ValueError, match="max_pieces"):
        codes.incidence(max_pieces=0)


def test_mistakes_are_named(english: tuple[Tokenizer, TokenCodes], tokenizer: Tokenizer) -> None:
    _, codes = english
    tree = MergeTree.from_tokenizer(tokenizer)
    for call in (lambda: codes.similar([10**6]), lambda: codes.factors(-1)):
        with pytest.raises(ValueError, match="there is no token"):
            call()
    with pytest.raises(ValueError, match="k must be"):
        codes.similar([0], 0)
    with pytest.raises(ValueError, match=r"\(350,\)"):
        TokenCodes.build(tree, np.ones(7, dtype=np.int64))
    for counts in (np.full(350, np.nan), np.full(350, 0.5), np.full(350, -1)):
        with pytest.raises(ValueError, match="whole numbers and not negative"):
            TokenCodes.build(tree, counts)
    with pytest.raises(ValueError, match=r"a token's id is a whole number, not 1\.5"):
        codes.similar([1.5])


def test_without_counts_early_merges_have_small_primes(tokenizer: Tokenizer) -> None:
    tree = MergeTree.from_tokenizer(tokenizer)
    codes = TokenCodes.build(tree)
    assert codes.counts is None
    merged = np.flatnonzero(tree.ranks >= 0)
    by_rank = merged[np.argsort(tree.ranks[merged])]
    assert (np.diff(codes.primes[by_rank]) > 0).all()
    bytes_ = [i for i in range(len(tree)) if len(tree.texts[i]) == 1]
    assert codes.primes[bytes_].max() < codes.primes[merged].min()
    assert min(codes.primes[list(tree.special)]) > codes.primes[merged].max()


def same(a: TokenCodes, b: TokenCodes) -> bool:
    """Whether two tables hold the same."""
    arrays = ("primes", "kinds", "counts")
    equal = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
    codes = ("offsets", "primes", "exponents")
    equal &= all(np.array_equal(getattr(a.codes, n), getattr(b.codes, n)) for n in codes)
    return equal and a.labels == b.labels and a.tokenizer_sha256 == b.tokenizer_sha256


def test_a_file_of_codes_comes_back(
    english: tuple[Tokenizer, TokenCodes], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _, codes = english
    path = tmp_path / "codes.safetensors"
    save_codes(codes, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert same(load_codes(path, codes.tokenizer_sha256), codes)
    other = MergeTree.from_tokenizer(tokenizer)
    with pytest.raises(ValueError, match=r"another tokenizer.*build the codes anew"):
        load_codes(path, other.sha256)
    save_codes(TokenCodes.build(other), path)
    assert load_codes(path, other.sha256).counts is None


def test_files_that_are_none_are_refused(
    english: tuple[Tokenizer, TokenCodes], tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    _, codes = english
    path = tmp_path / "codes.safetensors"
    with pytest.raises(ValueError, match="cannot read"):
        load_codes(path, codes.tokenizer_sha256)
    save_codes(codes, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot read"):
        load_codes(path, codes.tokenizer_sha256)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="no token codes"):
        load_codes(path, codes.tokenizer_sha256)
    facts = {"format": FORMAT, "tokenizer_sha256": codes.tokenizer_sha256}
    save_file({"a": np.zeros(3)}, path, metadata=facts)
    with pytest.raises(ValueError, match=r"damaged.*; build the codes anew"):
        load_codes(path, codes.tokenizer_sha256)
    save_file({"a": np.zeros(3)}, path, metadata={"format": FORMAT})
    with pytest.raises(ValueError, match="another tokenizer"):
        load_codes(path, codes.tokenizer_sha256)


def test_no_damage_to_a_file_of_codes_goes_unseen(
    english: tuple[Tokenizer, TokenCodes], tmp_path: Path
) -> None:
    _, codes = english
    path = tmp_path / "codes.safetensors"
    save_codes(codes, path)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    inside = [codes.codes.exponents, codes.codes.primes, codes.kinds, codes.primes]
    places = [whole.index(array.tobytes(), head) for array in inside]
    places.append(whole.index(b'"labels"') + 30)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="build the codes anew"):
            load_codes(path, codes.tokenizer_sha256)
