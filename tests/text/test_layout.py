"""Every order is a permutation that means what it says, and a renumbered tokenizer is the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.core.config import DataConfig, TokenizerConfig
from cllm.lattice.curves import hilbert_number, morton_number
from cllm.lattice.ulam import ulam
from cllm.text.corpus import prepare
from cllm.text.layout import LARGE, ORDERS, Order, chosen_order, laid_out, permutation
from cllm.text.tokenizer import Tokenizer

COUNTS = st.lists(st.integers(0, 20), min_size=1, max_size=400).map(np.array)


@given(st.sampled_from(ORDERS), COUNTS, st.integers(0, 2**63 - 1))
def test_each_order_is_a_permutation(order: Order, counts: np.ndarray, seed: int) -> None:
    rows = permutation(order, counts, seed)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(counts)))


@given(COUNTS)
def test_frequency_order_descends_and_keeps_ties(counts: np.ndarray) -> None:
    token_at = np.argsort(permutation("frequency", counts))
    pairs = [(-counts[token], token) for token in token_at]
    assert pairs == sorted(pairs)


@given(COUNTS, st.sampled_from(["ulam", "morton", "hilbert"]))
def test_rows_follow_their_curve_over_the_spiral(counts: np.ndarray, order: Order) -> None:
    token_at = np.argsort(permutation(order, counts))
    rank = permutation("frequency", counts)[token_at]
    x, y = ulam(rank + 1)
    x, y = x - x.min(), y - y.min()
    if order == "ulam":
        along = y * 1000 + x
    elif order == "morton":
        along = morton_number(x, y)
    else:
        side = int(max(x.max(), y.max())) + 1
        along = hilbert_number(x, y, max(1, (side - 1).bit_length()))
    assert (np.diff(along) > 0).all()


def test_hilbert_rows_of_a_whole_square_are_neighbours_in_the_plane() -> None:
    rank = np.argsort(permutation("hilbert", -np.arange(64 * 64)))
    x, y = ulam(rank + 1)
    np.testing.assert_array_equal(np.abs(np.diff(x)) + np.abs(np.diff(y)), 1)


def test_random_rows_depend_on_the_seed_alone() -> None:
    first, again = permutation("random", np.arange(99), 1), permutation("random", np.ones(99), 1)
    np.testing.assert_array_equal(first, again)
    assert (first != permutation("random", np.arange(99), 2)).any()


@pytest.mark.parametrize("counts", [np.zeros(0), np.zeros((2, 2)), np.array(1)])
def test_counts_of_another_shape_are_refused(counts: np.ndarray) -> None:
    with pytest.raises(ValueError, match="shape"):
        permutation("frequency", counts)


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="one of"):
        permutation("zigzag", np.ones(3))  # type: ignore[arg-type]


def test_the_setting_knows_the_same_orders() -> None:
    assert get_args(TokenizerConfig.model_fields["order"].annotation) == ("auto", *ORDERS)


def test_auto_is_bpes_own_order_below_the_size_at_which_pages_matter() -> None:
    assert chosen_order("auto", LARGE - 1) == "tokenizer"
    assert chosen_order("auto", LARGE) == "frequency"
    assert all(chosen_order(order, size) == order for order in ORDERS for size in (2, LARGE))


@pytest.mark.parametrize("order", ORDERS)
def test_a_laid_out_tokenizer_cuts_texts_as_before(tokenizer: Tokenizer, order: Order) -> None:
    text = "The fox doesn't mind: 日本語 Café <|endoftext|> \x00"
    other = laid_out(tokenizer, order, [text])
    assert other.special_tokens() == tokenizer.special_tokens()
    assert other.merges() == tokenizer.merges()
    assert other.vocab_size == tokenizer.vocab_size
    before, after = tokenizer.encode(text), other.encode(text)
    assert [tokenizer.token_name(i) for i in before] == [other.token_name(i) for i in after]
    assert other.decode(after) == text
    assert other.encode_bytes(b"\xff").tolist() == [other.encode_bytes(b"\xff\xff")[0]]
    assert (other.sha256 == tokenizer.sha256) == (order == "tokenizer")


def test_frequent_tokens_get_the_first_free_ids(tokenizer: Tokenizer) -> None:
    other = laid_out(tokenizer, "frequency", ["zzzz", "zz", "q"])
    names = [other.token_name(i) for i in (2, 3)]  # 0 and 1 are special
    assert names == ["z", "q"]


def test_what_is_no_permutation_is_refused(tokenizer: Tokenizer) -> None:
    ids = np.arange(tokenizer.vocab_size)
    for wrong in (ids[:-1], np.where(ids == 5, 6, ids)):
        with pytest.raises(ValueError, match="permutation"):
            tokenizer.renumbered(wrong)
    with pytest.raises(ValueError, match="special"):
        tokenizer.renumbered(ids[::-1])


def test_prepared_data_follow_the_order(tmp_path: Path, essay: Callable[[int, int], str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(essay(1, 3000), encoding="utf-8")
    found = {}
    for order in ("tokenizer", "frequency"):
        settings = TokenizerConfig(vocab_size=300, order=order)
        data = DataConfig(paths=(str(text),))
        found[order] = prepare(data, settings, tmp_path / order, seed=0, context=8)
    plain, sorted_ = found["tokenizer"], found["frequency"]
    assert sorted_.tokenizer.decode(sorted_.train.ids) == plain.tokenizer.decode(plain.train.ids)
    counts = np.bincount(sorted_.train.ids, minlength=300)[1:]
    assert (np.diff(counts) <= 0).all()
    vocab = json.loads(sorted_.tokenizer.to_json())["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(300))
