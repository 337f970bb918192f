"""UTF-8, strictly: what is wrong is told with its place, whatever the blocks were."""

from __future__ import annotations

import gzip
import re
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from cllm.core.errors import UserError
from cllm.text.decode import decode_blocks, read_blocks
from cllm.text.notes import Notes


def blocks(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def decoded(data: bytes, size: int = 1 << 20) -> tuple[str, Notes]:
    notes = Notes()
    return "".join(decode_blocks(iter(blocks(data, size)), "file.txt", notes)), notes


@given(st.text(alphabet=st.characters(exclude_characters="\0", codec="utf-8")), st.integers(1, 7))
def test_text_in_any_blocks(text: str, size: int) -> None:
    result, notes = decoded(b"x" + text.encode("utf-8"), size)
    assert result == "x" + text
    assert not notes.problems


@given(st.binary(min_size=4).filter(lambda b: b"\0" not in b), st.integers(4, 9))
def test_offsets_are_those_of_the_whole(data: bytes, size: int) -> None:
    data = b"text" + data
    _, notes = decoded(data, size)
    first = first_bad_byte(data)
    if first is None:
        assert not notes.problems
    else:
        assert re.search(rf"at offsets? {first:,}\b", notes.problems[0])


def first_bad_byte(data: bytes) -> int | None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None


def test_bad_bytes_are_counted_and_placed() -> None:
    _, notes = decoded(b"caf\xe9 \xff\xfe ok \x80\x80", size=3)
    assert notes.problems == [
        "file.txt is not UTF-8: 5 undecodable bytes, first at offsets 3, 5, 6; "
        "convert the file to UTF-8"
    ]


def test_many_bad_bytes_take_linear_time() -> None:
    data = b"caf\xe9 " * 400_000
    start = time.process_time()
    _, notes = decoded(data)
    assert "400,000 undecodable bytes" in notes.problems[0]
    assert time.process_time() - start < 10  # copying the rest at each would take minutes


def test_a_character_cut_off_at_the_end() -> None:
    _, notes = decoded("ab日".encode()[:-1], size=2)
    assert "undecodable bytes, first at offsets 2" in notes.problems[0]


def test_byte_order_mark_is_dropped_and_told() -> None:
    text, notes = decoded(b"\xef\xbb\xbfhello \xef\xbb\xbf")
    assert text == "hello \ufeff"
    assert notes.lines() == ("byte order mark dropped: file.txt",)
    _, notes = decoded(b"\xef\xbb\xbfab\xff")
    assert "at offset 5" in notes.problems[0]


@pytest.mark.parametrize(("codec", "name"), [("utf-16", "UTF-16"), ("utf-32", "UTF-32")])
def test_wide_encodings_are_named(codec: str, name: str) -> None:
    _, notes = decoded("hello".encode(codec))
    assert notes.problems == [
        f"file.txt is {name}, not UTF-8; convert it first (iconv -f {name} -t UTF-8)"
    ]


def test_nul_means_binary() -> None:
    _, notes = decoded(b"\x7fELF\x02\0\0", size=4)
    assert notes.problems == ["file.txt is binary (NUL byte at offset 5), not text"]


def compress(path: Path, data: bytes) -> bytes:
    return gzip.compress(data) if path.suffix == ".gz" else zstandard.compress(data)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_compressed(tmp_path: Path, name: str) -> None:
    path, data = tmp_path / name, bytes(range(256)) * 10_000
    packed = compress(path, data)
    path.write_bytes(packed + packed)  # members one after the other, as log rotation makes them
    assert b"".join(read_blocks(path)) == data + data


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("damage", ["cut", "altered", "other"])
def test_broken_compression_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    packed = bytearray(compress(path, bytes(range(256)) * 1000))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "altered":
        packed[len(packed) // 2] ^= 0xFF
        packed[-5] ^= 0xFF
    else:
        packed = bytearray(b"no such format")
    path.write_bytes(packed)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        b"".join(read_blocks(path))
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        list(read_blocks(tmp_path / "none.txt"))
