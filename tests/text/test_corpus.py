"""From files to an opened data set, as a user does it, and back from disk."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cllm.core.config import DataConfig, TokenizerConfig
from cllm.core.errors import UsageError, UserError
from cllm.text.batches import IGNORED, BatchSource, evaluation_windows
from cllm.text.corpus import prepare, tokenizer_from, tokens_for_eval
from cllm.text.dataset import Dataset, load_prepared
from cllm.text.packed import PackedTokens
from cllm.text.report import CorpusReport
from cllm.text.tokenizer import Tokenizer

Essay = Callable[[int, int], str]
SMALL = TokenizerConfig(vocab_size=300)


def make(
    directory: Path, *paths: Path, tokenizer: TokenizerConfig = SMALL, **more: object
) -> Dataset:
    """``prepare`` with a context of 16."""
    data = {"paths": tuple(map(str, paths)), **more.pop("data", {})}  # type: ignore[dict-item]
    return prepare(DataConfig(**data), tokenizer, directory, seed=0, context=16, **more)  # type: ignore[arg-type]


@pytest.fixture
def notes(tmp_path: Path, essay: Essay) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(60):
        (folder / f"n{i:02}.txt").write_text(f"Note {i}: é日\n" + essay(i, 60), encoding="utf-8")
    return folder


def documents_of(tokens: PackedTokens, tokenizer: Tokenizer) -> list[str]:
    """The documents between the end tokens."""
    ids = tokens.ids.astype(np.int64)
    ends = np.flatnonzero(ids == tokenizer.end_id)
    assert ends[0] == 0
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in itertools.pairwise(ends)]


def test_documents_come_back_whole(tmp_path: Path, notes: Path) -> None:
    said: list[str] = []
    stages: set[str] = set()
    dataset = make(
        tmp_path / "run" / "data", notes, say=said.append, progress=lambda s, f: stages.add(s)
    )
    splits = [dataset.train, dataset.validation, dataset.test]
    texts = [
        text for tokens in splits if tokens for text in documents_of(tokens, dataset.tokenizer)
    ]
    assert sorted(texts) == sorted(p.read_text(encoding="utf-8") for p in notes.iterdir())
    report = dataset.report
    assert report.bytes == sum(p.stat().st_size for p in notes.iterdir())
    assert report.bytes == sum(tokens.text_bytes for tokens in splits if tokens)
    assert report.documents == report.source_count == 60
    assert report.split == "document"
    assert report.vocab_asked == report.vocab_size == 300
    assert report.sample_bytes == report.splits["train"].bytes == dataset.train.scored_bytes
    assert stages >= {"reading", "duplicates", "tokenizer", "encoding train", "encoding test"}
    assert any("60 documents" in line for line in said)
    again = CorpusReport.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report


def test_reopening_without_the_sources(tmp_path: Path, notes: Path) -> None:
    dataset = make(tmp_path / "data", notes)
    for path in notes.iterdir():
        path.unlink()
    again = load_prepared(tmp_path / "data")
    assert again.report == dataset.report
    assert again.tokenizer.sha256 == dataset.tokenizer.sha256
    np.testing.assert_array_equal(again.train.ids, dataset.train.ids)


def inodes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_the_same_request_finds_its_files_another_does_not(tmp_path: Path, notes: Path) -> None:
    directory = tmp_path / "data"
    make(directory, notes)
    before = inodes(directory)
    make(directory, notes)
    assert inodes(directory) == before
    for change in (
        {"data": {"validation": 0.1}},
        {"tokenizer": TokenizerConfig(vocab_size=299)},
        {"data": {"near_duplicates": "off"}},
    ):
        make(directory, notes, **change)
        assert inodes(directory) != before
        before = inodes(directory)
    (notes / "n00.txt").write_text("changed " * 60, encoding="utf-8")
    dataset = make(directory, notes, data={"near_duplicates": "off"})
    assert inodes(directory) != before
    assert sum(t.documents for t in (dataset.train, dataset.validation, dataset.test) if t) == 60


def test_two_preparations_are_equal(tmp_path: Path, notes: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / name, notes)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_cache_between_runs(tmp_path: Path, notes: Path) -> None:
    said: list[str] = []
    first = make(tmp_path / "one", notes, cache=tmp_path / "cache")
    second = make(tmp_path / "two", notes, cache=tmp_path / "cache", say=said.append)
    assert any("prepared before" in line for line in said)
    assert second.report == first.report
    np.testing.assert_array_equal(second.train.ids, first.train.ids)


@pytest.mark.parametrize("name", ["train.tokens", "test.tokens", "tokenizer.json", "prepared.json"])
@pytest.mark.parametrize("damage", ["altered", "cut", "gone"])
def test_damaged_files_are_refused(tmp_path: Path, notes: Path, name: str, damage: str) -> None:
    make(tmp_path / "data", notes)
    path = tmp_path / "data" / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        altered = data.replace(b'"key"', b'"kez"').replace(b'"version"', b'"versiom"')
        path.write_bytes(altered[:-1] + bytes([data[-1] ^ 1]) if damage == "altered" else data[:-9])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_prepared(tmp_path / "data")


def test_one_book_is_split_by_blocks(tmp_path: Path, essay: Essay) -> None:
    (tmp_path / "book.md").write_text(essay(0, 80_000), encoding="utf-8")
    dataset = make(tmp_path / "data", tmp_path / "book.md")
    assert dataset.report.split == "block"
    assert dataset.validation is not None
    assert dataset.validation.documents >= 2
    assert dataset.report.splits["test"].bytes == pytest.approx(dataset.report.bytes / 20, rel=0.3)


def test_no_held_out_text(tmp_path: Path, notes: Path) -> None:
    dataset = make(tmp_path / "data", notes, data={"validation": 0.0, "test": 0.0})
    assert dataset.validation is None
    assert dataset.test is None
    assert dataset.train.documents == 60
    assert set(dataset.report.splits) == {"train"}


def test_records_score_answers_only(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    records = [{"prompt": f"What is {i}+1?", "completion": f" It is {i + 1}."} for i in range(300)]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    dataset = make(tmp_path / "data", path, data={"near_duplicates": "off"})
    train, tokenizer = dataset.train, dataset.tokenizer
    inputs = np.concatenate([x.ravel() for x, _ in evaluation_windows(train, 16, 4)])
    targets = np.concatenate([y.ravel() for _, y in evaluation_windows(train, 16, 4)])
    scored = targets[targets != IGNORED]
    assert len(scored) == train.scored_tokens
    answers = [t.split("?")[1] for t in documents_of(train, tokenizer)]
    assert tokenizer.decode(scored) == "".join(answers)
    assert (scored == tokenizer.end_id).sum() == train.documents
    assert train.scored_bytes == sum(map(len, answers)) < train.text_bytes
    assert len(inputs) == len(targets)
    assert "prompt/completion" in dataset.report.notes[0]
    _, shown = BatchSource(train, 16, 4, 0).batch(0)
    assert (shown == IGNORED).any()


def test_given_tokenizers(tmp_path: Path, notes: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t.json")
    config = TokenizerConfig(file=str(tmp_path / "t.json"))
    from_file = make(tmp_path / "a", notes, tokenizer=config)
    reused = make(tmp_path / "b", notes, reuse=tokenizer)
    assert from_file.tokenizer.sha256 == reused.tokenizer.sha256 == tokenizer.sha256
    np.testing.assert_array_equal(from_file.train.ids, reused.train.ids)
    assert from_file.report.vocab_asked is None


def test_the_tokenizer_sees_training_text_alone(tmp_path: Path, notes: Path, essay: Essay) -> None:
    for path in notes.iterdir():
        mark = "".join(chr(ord("k") + int(digit)) for digit in path.stem[1:]) + "zq"
        path.write_text(f"{mark} {mark} {mark} " * 8 + essay(3, 40), encoding="utf-8")
    config = TokenizerConfig(vocab_size=2000)
    dataset = make(tmp_path / "data", notes, tokenizer=config, data={"near_duplicates": "off"})
    known = b" ".join(dataset.tokenizer.token_bytes(i) for i in range(dataset.tokenizer.vocab_size))
    assert dataset.test is not None
    held = [text.split()[0] for text in documents_of(dataset.test, dataset.tokenizer)]
    trained = [text.split()[0] for text in documents_of(dataset.train, dataset.tokenizer)]
    assert not any(mark.encode() in known for mark in held)
    assert all(mark.encode() in known for mark in trained)
    assert dataset.report.vocab_size < 2000
    assert any("fewer repeated pairs" in line for line in dataset.report.lines())


def test_sample_limit(tmp_path: Path, essay: Essay) -> None:
    (tmp_path / "book.txt").write_text(essay(0, 60_000), encoding="utf-8")
    config = TokenizerConfig(vocab_size=300, sample_bytes=100_000)
    report = make(tmp_path / "data", tmp_path / "book.txt", tokenizer=config).report
    assert 50_000 < report.sample_bytes <= 100_000


def test_near_duplicates_are_dropped(tmp_path: Path, notes: Path) -> None:
    for path in sorted(notes.iterdir())[:60]:
        text = path.read_text(encoding="utf-8")
        (notes / f"{path.stem}-copy.txt").write_text(f"Copy!\n{text}", encoding="utf-8")
    found = make(tmp_path / "a", notes).report.duplicates
    assert found.found > 0
    dropped = make(tmp_path / "b", notes, data={"near_duplicates": "drop"})
    assert dropped.report.duplicates.dropped >= found.found - 1
    assert dropped.train.documents == 120 - dropped.report.duplicates.dropped - sum(
        t.documents for t in (dropped.validation, dropped.test) if t
    )


UNANSWERED = b"".join(b'{"prompt": "question %d", "completion": ""}\n' % i for i in range(200))
WRONG: list[tuple[str, dict[str, bytes], str]] = [
    ("empty file", {"a.txt": b""}, "there is no text in"),
    ("only white", {"a.html": b"<p> </p>"}, "there is no text in"),
    ("binary", {"a.txt": b"abc\0def" * 100}, r"a\.txt is binary \(NUL byte at offset 3\)"),
    (
        "two bad files",
        {"a.txt": b"caf\xe9", "b.txt": b"fine", "c.md": b"\xff"},
        r"a\.txt is not UTF-8: 1 undecodable byte, at offset 3.*c\.md is not UTF-8",
    ),
    ("bad JSON", {"a.jsonl": b'{"text": "x"}\n{'}, r"a\.jsonl:2 is not JSON"),
    ("one word", {"a.txt": b"word"}, "too short"),
    ("a few lines", {"a.txt": b"a few words\n" * 20}, r"the corpus is too short: of 240 bytes"),
    ("no answers", {"a.jsonl": UNANSWERED}, "the loss counts on nothing"),
]


@pytest.mark.parametrize(("files", "message"), [c[1:] for c in WRONG], ids=[c[0] for c in WRONG])
def test_wrong_text_is_one_line_and_nothing_is_left(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        make(tmp_path / "run" / "data", folder)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_failure_leaves_older_data_as_they_were(tmp_path: Path, notes: Path) -> None:
    make(tmp_path / "data", notes)
    (notes / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        make(tmp_path / "data", notes)
    assert load_prepared(tmp_path / "data").report.documents == 60


def test_foreign_directories_are_not_replaced(tmp_path: Path, notes: Path) -> None:
    with pytest.raises(UserError, match="holds other files"):
        make(notes, notes)
    assert len(list(notes.iterdir())) == 60
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        make(tmp_path / "file" / "data", notes)


def test_context_is_checked_again_on_reuse(tmp_path: Path, notes: Path) -> None:
    make(tmp_path / "data", notes)
    config = DataConfig(paths=(str(notes),))
    with pytest.raises(UserError, match=r"one context of 100,000 tokens"):
        prepare(config, SMALL, tmp_path / "data", seed=0, context=100_000)


def test_special_tokens_must_fit(tmp_path: Path, notes: Path) -> None:
    config = TokenizerConfig(vocab_size=257, special_tokens=("<|a|>",))
    with pytest.raises(UsageError, match="at least 258"):
        make(tmp_path / "data", notes, tokenizer=config)


@pytest.mark.skipif(os.name != "posix", reason="file size limits are a POSIX thing")
def test_full_disk(tmp_path: Path, notes: Path) -> None:
    """A limit on file sizes stands in for a full disk: one line, and nothing is left."""
    program = (
        "import resource, signal, sys; from pathlib import Path;"
        "from cllm.core.config import DataConfig, TokenizerConfig;"
        "from cllm.core.errors import UserError; from cllm.text.corpus import prepare;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
        "try: prepare(DataConfig(paths=(sys.argv[1],)), TokenizerConfig(vocab_size=300),"
        " Path(sys.argv[2]), seed=0, context=16)\n"
        "except UserError as error: print(error)"
    )
    for limit in (2_000, 30_000):
        arguments = [sys.executable, "-c", program, str(notes), str(tmp_path / "data"), str(limit)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("cannot write"), done.stdout + done.stderr
        assert done.stdout.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_tokens_for_eval(tmp_path: Path, notes: Path, tokenizer: Tokenizer) -> None:
    place = tmp_path / "eval"
    place.mkdir()
    tokens = tokens_for_eval([str(notes / "n0*.txt")], tokenizer, place)
    texts = [p.read_text(encoding="utf-8") for p in sorted(notes.glob("n0*.txt"))]
    assert documents_of(tokens, tokenizer) == texts
    assert tokens.scored_bytes == sum(len(t.encode("utf-8")) for t in texts)
    (tmp_path / "none.txt").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no text"):
        tokens_for_eval([str(tmp_path / "none.txt")], tokenizer, place)


def test_tokenizer_from(tmp_path: Path, notes: Path) -> None:
    tokenizer, used = tokenizer_from([str(notes)], SMALL, tmp_path)
    assert tokenizer.vocab_size == 300
    assert used == sum(p.stat().st_size for p in notes.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]


def test_builtin_corpus(tmp_path: Path) -> None:
    config = TokenizerConfig(vocab_size=1024)
    dataset = prepare(DataConfig(), config, tmp_path / "data", seed=0, context=128)
    assert dataset.report.split == "document"
    assert dataset.report.bytes > 1_500_000
    assert dataset.report.bytes_per_token > 2.5
    for name in ("validation", "test"):
        share = dataset.report.splits[name].bytes / dataset.report.bytes
        assert share == pytest.approx(0.05, abs=0.005)


def test_real_texts(tmp_path: Path, real_data: Path) -> None:
    dataset = make(tmp_path / "data", real_data / "tinyshakespeare.txt")
    assert dataset.report.bytes == 1_115_394
    windows = evaluation_windows(dataset.train, 64, 16)
    ids = np.concatenate([y[y != IGNORED] for _, y in windows])
    text = (real_data / "tinyshakespeare.txt").read_bytes()
    ends = np.flatnonzero(ids == dataset.tokenizer.end_id)
    for part in np.split(ids, ends):
        assert dataset.tokenizer.decode_bytes(part) in text
    assert len(dataset.tokenizer.decode_bytes(ids)) == dataset.train.scored_bytes
