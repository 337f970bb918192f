"""Splits: disjoint, whole, by bytes, the same for a seed; pieces and samples of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.core.errors import UsageError, UserError
from cllm.text.document import Document
from cllm.text.pieces import cut_piece, pieces, sample, trimmed_end
from cllm.text.splits import Splits, segment_bytes, split_corpus, whole_corpus
from cllm.text.spool import Spool
from cllm.text.tokenizer import Tokenizer

SpoolOf = Callable[[list[Document]], Spool]
Essay = Callable[[int, int], str]


def texts_of(spool: Spool, table: np.ndarray) -> list[str]:
    return [spool.read(int(a), int(b)).decode("utf-8") for _, a, b in table]


def split(spool: Spool, method: str = "auto", seed: int = 0, share: float = 0.05) -> Splits:
    return split_corpus(spool, validation=share, test=share, method=method, seed=seed)  # type: ignore[arg-type]


def check_cover(spool: Spool, splits: Splits) -> None:
    """The segments cover the corpus once and stay inside their documents."""
    table = np.concatenate([t for _, t in splits.items()])
    table = table[np.argsort(table[:, 1])]
    assert table[0, 1] == 0
    assert table[-1, 2] == spool.size
    np.testing.assert_array_equal(table[1:, 1], table[:-1, 2])
    assert (spool.ends[table[:, 0]] <= table[:, 1]).all()
    assert (table[:, 2] <= spool.ends[table[:, 0] + 1]).all()
    for _, part in splits.items():
        assert (np.diff(part[:, 1]) > 0).all()


@given(
    st.lists(st.text(alphabet="ab é日\n", min_size=15, max_size=50), min_size=1, max_size=40),
    st.sampled_from(["auto", "document", "block"]),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.05, 0.3]),
)
@settings(deadline=None)
def test_cover(spool_of: SpoolOf, texts: list[str], method: str, seed: int, share: float) -> None:
    spool = spool_of([Document(f"d{i}", text) for i, text in enumerate(texts)])
    # There may be too little, or, where documents must stay whole, a text with its copies may be more than
    # half of a part: refused, or split as below.
    size = {text: texts.count(text) * len(text.encode("utf-8")) for text in texts}
    large = method == "document" and max(size.values()) > share / 2 * sum(size.values())
    if (len(set(texts)) < 8 and share) or (share == 0.3 and large):
        with contextlib.suppress(UserError):
            check_cover(spool, split(spool, method, seed, share))
        return
    splits = split(spool, method, seed, share)
    check_cover(spool, splits)
    for name, table in splits.items():
        assert len(table) or (share == 0 and name != "train")
        texts_of(spool, table)  # each segment is whole UTF-8
    if splits.method == "document":
        held = set(texts_of(spool, splits.test)), set(texts_of(spool, splits.train))
        assert not held[0] & held[1]


def test_documents_that_leave_a_part_empty_are_cut_into_blocks(spool_of: SpoolOf) -> None:
    texts = ["a" * size for size in (15, 16, 19, 20, 21, 22, 26, 43, 43)]
    spool = spool_of([Document(f"d{i}", text) for i, text in enumerate(texts)])
    with pytest.raises(UserError, match="leave nothing for train"):
        split(spool, "document", share=0.3)
    splits = split(spool, share=0.3)
    assert splits.method == "block"
    check_cover(spool, splits)
    assert all(len(table) for _, table in splits.items())


def test_by_document(spool_of: SpoolOf, essay: Essay) -> None:
    documents = [Document(f"d{i}", essay(i, 20 + i % 50)) for i in range(500)]
    spool = spool_of(documents)
    splits = split(spool)
    assert splits.method == "document"
    for table in (splits.validation, splits.test):
        assert segment_bytes(table) / spool.size == pytest.approx(0.05, abs=0.005)
    again, other = split(spool), split(spool, seed=1)
    np.testing.assert_array_equal(again.test, splits.test)
    assert set(other.test[:, 0]) != set(splits.test[:, 0])
    shuffled = split(spool_of(documents[::-1]))
    same = set(texts_of(spool, splits.test)) & {
        documents[499 - d].text for d in shuffled.test[:, 0]
    }
    assert len(same) > 0.9 * len(splits.test)  # what is held out hangs on the text, not its place


def test_copies_stay_together(spool_of: SpoolOf, essay: Essay) -> None:
    spool = spool_of([Document(f"d{i}", essay(i // 5, 30)) for i in range(500)])
    splits = split(spool)
    parts = [set(texts_of(spool, table)) for _, table in splits.items()]
    assert not parts[0] & (parts[1] | parts[2])
    assert not parts[1] & parts[2]


def test_one_giant_among_many_is_trained_on(spool_of: SpoolOf, essay: Essay) -> None:
    small = [Document(f"d{i}", essay(i, 50)) for i in range(200)]
    spool = spool_of([*small, Document("giant", essay(999, 8000))])
    splits = split(spool)
    assert splits.method == "document"
    assert 200 in splits.train[:, 0]


def test_by_block(spool_of: SpoolOf, essay: Essay) -> None:
    spool = spool_of([Document("book", essay(0, 40_000)), Document("more", essay(1, 9_000))])
    splits = split(spool)
    assert splits.method == "block"
    for table in (splits.validation, splits.test):
        assert segment_bytes(table) / spool.size == pytest.approx(0.05, abs=0.01)
        assert len(table) >= 2
    starts = [spool.read(int(a) - 1, int(a)) for _, a, _ in splits.train[1:] if a != spool.ends[1]]
    assert set(starts) == {b"\n"}
    assert (split(spool, seed=1).test[:, 1].tolist()) != splits.test[:, 1].tolist()


def test_a_short_text_has_one_block_a_split(spool_of: SpoolOf, essay: Essay) -> None:
    spool = spool_of([Document("page", essay(0, 1000))])
    splits = split(spool)
    assert len(splits.test) == len(splits.validation) == 1


def test_text_without_lines_is_cut_between_characters(spool_of: SpoolOf) -> None:
    spool = spool_of([Document("d", "日本" * 20_000)])
    splits = split(spool)
    check_cover(spool, splits)
    for _, table in splits.items():
        assert set("".join(texts_of(spool, table))) == {"日", "本"}


def test_refusals(spool_of: SpoolOf) -> None:
    with pytest.raises(UserError, match="too short to split: 2 bytes in 2 different documents"):
        split(spool_of([Document("a", "x"), Document("b", "y")]), "document")
    with pytest.raises(UserError, match="too short to split"):
        split(spool_of([Document("a", "x")]))
    records = spool_of([Document(f"r{i}", f"q{i} a", ((3, 4),)) for i in range(10)])
    with pytest.raises(UsageError, match="in two"):
        split(records, "block")
    assert split(records).method == "document"


def test_spool(spool_of: SpoolOf) -> None:
    documents = [
        Document("a", "é1", ((1, 2),)),
        Document("void", ""),
        Document("b", "日"),
        Document("b", "本", continues=True),
        Document("c", "é1"),
    ]
    spool = spool_of(documents)
    assert spool.documents == 3
    assert [spool.name(i) for i in range(3)] == ["a", "b", "c"]
    assert spool.ends.tolist() == [0, 3, 9, 12]
    assert [spool.spans(i) for i in range(3)] == [[(2, 3)], None, None]
    assert spool.digests[0] == spool.digests[2] != spool.digests[1]
    assert spool.masked
    assert spool_of(documents).sha256 == spool.sha256
    assert spool_of([Document("a", "é1"), *documents[1:]]).sha256 != spool.sha256
    joined = [Document("a", "é1日本", ((1, 2),)), documents[-1]]
    assert spool_of(joined).sha256 != spool.sha256


@given(st.text(alphabet="ab1 \t\n'é日.", min_size=1, max_size=400), st.integers(5, 60))
@settings(deadline=None, max_examples=200)
def test_pieces_have_the_tokens_of_the_whole(
    spool_of: SpoolOf, tokenizer: Tokenizer, text: str, size: int
) -> None:
    spool = spool_of([Document("d", text)])
    parts = list(pieces(spool, 0, spool.size, size))
    assert b"".join(parts).decode("utf-8") == text
    assert max(map(len, parts)) <= size
    if all(b" " in part for part in parts) and "日" not in text:
        ids = np.concatenate([tokenizer.encode(part.decode("utf-8")) for part in parts])
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_cuts() -> None:
    assert cut_piece(b"some words here") == 10
    assert cut_piece(b"a,b\n c") == 3
    assert cut_piece("日本".encode()[:-1]) == 3
    assert trimmed_end(b"ab\xc3") == 2
    assert trimmed_end("é".encode()) == 2


def test_sample(spool_of: SpoolOf, essay: Essay) -> None:
    spool = spool_of([Document(f"d{i}", "é" + essay(i, 30_000)) for i in range(6)])
    table = whole_corpus(spool)[1:]
    everything = b"".join(sample(spool, table, spool.size, 0))
    assert everything == spool.read(int(spool.ends[1]), spool.size)
    limit = spool.size // 3
    some = list(sample(spool, table, limit, 0))
    assert 0.6 * limit < sum(map(len, some)) <= limit
    assert all(part in everything for part in some)
    assert some == list(sample(spool, table, limit, 0))
    assert some != list(sample(spool, table, limit, 1))
