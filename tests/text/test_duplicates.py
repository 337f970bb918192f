"""Near-duplicates: found where they are, not where they are not, and dropped from training alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.text.document import Document
from cllm.text.duplicates import BANDS, ROWS, remove_duplicates, signatures, subtract
from cllm.text.shingles import jaccard, shingles, words
from cllm.text.splits import Splits, segment_bytes, split_corpus, whole_corpus
from cllm.text.spool import Spool

SpoolOf = Callable[[list[Document]], Spool]
Essay = Callable[[int, int], str]


def hashes_of(text: str) -> list[int]:
    return words(text.encode("utf-8"))[1].tolist()


def test_words() -> None:
    starts, hashes = words("Ab ab, é日x\nA2b".encode())
    assert starts.tolist() == [0, 3, 7, 9, 12, 14]
    assert hashes[0] == hashes[1]
    assert len(set(hashes.tolist())) == 5
    assert hashes_of("") == hashes_of(" ,.\n") == []


@given(st.lists(st.text(alphabet="abcXYZ019", min_size=1, max_size=40), max_size=8))
def test_words_hang_on_nothing_around_them(parts: list[str]) -> None:
    apart = [hash_ for part in parts for hash_ in hashes_of(part)]
    assert hashes_of("  " + "--\n".join(parts)) == apart
    assert hashes_of(" ".join(parts).upper()) == apart


def test_jaccard(essay: Essay) -> None:
    text = essay(0, 104).split()
    a = shingles(words(" ".join(text).encode())[1])
    b = shingles(words(" ".join([*text[:54], "other", *text[55:]]).encode())[1])
    assert len(a) == 100
    assert jaccard(a, a) == 1.0
    assert jaccard(a, b) == pytest.approx(95 / 105)
    assert len(shingles(words(b"one two three four")[1])) == 0


def test_signatures_estimate_the_jaccard_index(essay: Essay) -> None:
    """P(equal minima) is the Jaccard index (Broder 1997), also with units side by side."""
    base = essay(1, 4000).split()
    changed = list(base)
    for i in range(0, len(base), 20):
        changed[i] = "changed"
    units = [words(" ".join(t).encode())[1] for t in (essay(2, 50).split(), base, changed)]
    bounds = np.cumsum([0, *map(len, units)])
    minima = signatures(np.concatenate(units), bounds)
    alone = signatures(units[1], np.array([0, len(units[1])]))
    np.testing.assert_array_equal(minima[1], alone[0])
    exact = jaccard(shingles(units[1]), shingles(units[2]))
    assert (minima[1] == minima[2]).mean() == pytest.approx(exact, abs=0.2)
    assert 0.5 < exact < 0.7
    assert not (minima[0] == minima[1]).any()
    assert minima.shape == (3, BANDS * ROWS)


def edited(text: str, every: int) -> str:
    parts = text.split(" ")
    for i in range(every // 2, len(parts), every):
        parts[i] = f"edit{i}"
    return " ".join(parts).upper().replace("\n", "\n\n")


def planted(spool_of: SpoolOf, essay: Essay) -> tuple[Spool, Splits]:
    """Held-out documents 0–9; 10–14 of training nearly repeat 0–4, 15–19 share half with 5–9."""
    texts = [essay(i, 300) for i in range(10)]
    near = [edited(text, 100) for text in texts[:5]]
    half = [text[: len(text) // 2] + essay(100 + i, 150) for i, text in enumerate(texts[5:])]
    others = [essay(200 + i, 300) for i in range(80)]
    spool = spool_of([Document(f"d{i}", t) for i, t in enumerate([*texts, *near, *half, *others])])
    table = whole_corpus(spool)
    return spool, Splits("document", table[10:], table[:6], table[6:10])


def test_report(spool_of: SpoolOf, essay: Essay) -> None:
    spool, splits = planted(spool_of, essay)
    same, report = remove_duplicates(spool, splits, "report", 0)
    np.testing.assert_array_equal(same.train, splits.train)
    assert (report.checked, report.found, report.dropped) == (10, 5, 0)
    assert report.checked_bytes == segment_bytes(splits.validation) + segment_bytes(splits.test)
    assert report.found_bytes == segment_bytes(splits.validation[:5])
    assert set(report.examples) == {f"d{i} ~ d{i + 10}" for i in range(5)}


def test_drop(spool_of: SpoolOf, essay: Essay) -> None:
    spool, splits = planted(spool_of, essay)
    result, report = remove_duplicates(spool, splits, "drop", 0)
    assert result.train[:, 0].tolist() == list(range(15, 100))
    np.testing.assert_array_equal(result.validation, splits.validation)
    np.testing.assert_array_equal(result.test, splits.test)
    assert (report.found, report.dropped) == (5, 5)
    assert report.dropped_bytes == segment_bytes(splits.train[:5])
    _, after = remove_duplicates(spool, result, "report", 0)
    assert after.found == 0


def test_off(spool_of: SpoolOf, essay: Essay) -> None:
    spool, splits = planted(spool_of, essay)
    same, report = remove_duplicates(spool, splits, "off", 0)
    assert same is splits
    assert report.checked == 0


def test_every_copy_of_a_held_out_text_is_dropped(spool_of: SpoolOf, essay: Essay) -> None:
    text = essay(0, 200)
    others = [essay(1 + i, 200) for i in range(20)]
    spool = spool_of(
        [Document(str(i), t) for i, t in enumerate([text, text, *others, *[text] * 4])]
    )
    table = whole_corpus(spool)
    splits = Splits("document", table[2:], table[:1], table[1:2])
    result, report = remove_duplicates(spool, splits, "drop", 0)
    assert report.dropped == 4
    assert report.found == 2
    assert result.train[:, 0].tolist() == list(range(2, 22))


def test_a_passage_that_a_long_text_repeats(spool_of: SpoolOf, essay: Essay) -> None:
    """In blocks, the units find each other though the passage stands at another place."""
    passage = essay(5, 3000)
    book = essay(1, 20_000) + passage + essay(2, 17_000) + passage + essay(3, 20_000)
    spool = spool_of([Document("book", book)])
    first = book.index(passage)
    second = book.rindex(passage)
    held_out = np.array([[0, first - 500, first + len(passage) + 500]])
    train = np.array([[0, 0, first - 500], [0, first + len(passage) + 500, len(book)]])
    splits = Splits("block", train, held_out, held_out[:0])
    result, report = remove_duplicates(spool, splits, "drop", 0)
    assert report.dropped_bytes > 0.8 * len(passage)
    assert report.found_bytes > 0.8 * len(passage)
    lost = set(range(len(book))) - {i for _, a, b in result.train for i in range(a, b)}
    lost -= set(range(first - 500, first + len(passage) + 500))
    assert min(lost) >= second - 3000
    assert max(lost) <= second + len(passage) + 3000
    for _, start, end in result.train:
        spool.read(int(start), int(end)).decode("utf-8")


def test_nothing_held_out_and_texts_without_words(spool_of: SpoolOf) -> None:
    spool = spool_of([Document(str(i), "--! " * (i + 1)) for i in range(60)])
    splits = split_corpus(spool, validation=0.1, test=0.0, method="document", seed=0)
    _, report = remove_duplicates(spool, splits, "report", 0)
    assert report.found == 0
    everything = Splits("document", whole_corpus(spool), splits.test, splits.test)
    assert remove_duplicates(spool, everything, "drop", 0)[0] is everything


@given(st.lists(st.integers(0, 99), min_size=2, max_size=12, unique=True).map(sorted))
def test_subtract(places: list[int]) -> None:
    segments = np.array([[0, 0, 40], [1, 40, 70], [1, 80, 100]])
    pairs = zip(places[::2], places[1::2], strict=False)
    holes = [(d, a, b) for a, b in pairs for d, s, e in segments.tolist() if s <= a < b <= e]
    table = np.array(holes, dtype=np.int64).reshape(-1, 3)
    result = subtract(segments, table)
    left = [i for _, a, b in result.tolist() for i in range(a, b)]
    gone = {i for _, a, b in holes for i in range(a, b)}
    assert left == [i for _, a, b in segments.tolist() for i in range(a, b) if i not in gone]
    assert (result[:, 1] < result[:, 2]).all()
