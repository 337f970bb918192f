"""Packed files: what is written is read, and anything else is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.core.errors import UserError
from cllm.text.packed import HEADER_BYTES, PackedTokens, packed_dtype, packed_writer

KEY = "ab" * 32
PIECES = st.lists(
    st.lists(st.tuples(st.lists(st.integers(0, 299), max_size=20), st.booleans()), max_size=4),
    min_size=1,
    max_size=5,
)


def write(path: Path, documents: list, vocab_size: int = 300, key: str = KEY) -> None:
    """Write documents of (ids, counts) pieces; each id stands for two bytes."""
    with packed_writer(path, vocab_size=vocab_size, end_id=7) as writer:
        for document in documents:
            for ids, counts in document:
                writer.write(np.array(ids, dtype=np.int64), 2 * len(ids), counts=counts)
            writer.end_document(counts=bool(document) and document[-1][1])
        writer.finish(key)


@given(PIECES, st.sampled_from([300, 1 << 16, (1 << 16) + 1]))
@settings(deadline=None, max_examples=60)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list, vocab: int) -> None:
    path = tmp_path_factory.mktemp("packed") / "split.tokens"
    write(path, documents, vocab)
    ids, mask = [7], [False]
    for document in documents:
        for piece, counts in document:
            ids += piece
            mask += [counts] * len(piece)
        ids.append(7)
        mask.append(bool(document) and document[-1][1])
    packed = PackedTokens.open(path, key=KEY)
    assert packed.ids.dtype == ("<u2" if vocab <= 1 << 16 else "<u4")
    assert packed.ids.tolist() == ids
    counted = packed.counts(np.arange(1, len(ids)))
    assert counted.tolist() == mask[1:]
    assert packed.documents == len(documents)
    assert packed.scored_tokens == sum(mask)
    assert packed.text_bytes == 2 * sum(len(p) for d in documents for p, _ in d)
    assert packed.scored_bytes == 2 * sum(len(p) for d in documents for p, c in d if c)


def test_dtype_at_the_edge() -> None:
    assert packed_dtype(65_536) == np.dtype("<u2")
    assert packed_dtype(65_537) == np.dtype("<u4")


def test_no_mask_where_everything_counts(tmp_path: Path) -> None:
    write(tmp_path / "a", [[([1, 2], True)]])
    packed = PackedTokens.open(tmp_path / "a")
    assert packed.mask_bits is None
    assert packed.scored_tokens == len(packed) - 1
    assert (tmp_path / "a").stat().st_size == HEADER_BYTES + 2 * 4
    assert packed.ids.ctypes.data % 64 == 0


@pytest.mark.parametrize("place", [0, 9, 40, HEADER_BYTES - 1, HEADER_BYTES, -1])
def test_any_altered_byte_is_refused(tmp_path: Path, place: int) -> None:
    path = tmp_path / "split.tokens"
    write(path, [[([1, 2, 3], True), ([4], False)]])
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"split\.tokens"):
        PackedTokens.open(path)


@pytest.mark.parametrize("size", [0, 100, HEADER_BYTES, HEADER_BYTES + 5])
def test_truncated_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "split.tokens"
    write(path, [[([1, 2, 3], True)]])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"split\.tokens"):
        PackedTokens.open(path)


def test_another_key_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "split.tokens"
    write(path, [[([1], True)]])
    with pytest.raises(UserError, match="other data or settings"):
        PackedTokens.open(path, key="cd" * 32)
    with pytest.raises(UserError, match="no packed token file"):
        PackedTokens.open(tmp_path / "none")


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "split.tokens"
    write(path, [[([1], True)]])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write(path, [[([1, 2], True)], [(None, True)]])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
