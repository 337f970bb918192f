"""What the user names becomes a sorted list of sources, or one clear line."""

from __future__ import annotations

import gzip
import sys
import types
from pathlib import Path

import pytest

from cllm.core.errors import UsageError, UserError
from cllm.text.builtin import BuiltinSource, module_docstrings, standard_library
from cllm.text.decode import BLOCK
from cllm.text.document import Document
from cllm.text.hub import HubSource
from cllm.text.notes import Notes
from cllm.text.sources import FileSource, expand


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = ["b.txt", "a.MD", "sub/c.jsonl.gz", "sub/d.htm", "e.png", ".hidden.txt", ".git/f.txt",
             "code.py", "packed.bin.zst"]  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"text")
    return tmp_path


def names(tree: Path, *paths: str) -> list[str]:
    return [Path(source.name).relative_to(tree).as_posix() for source in expand(paths)]


def test_directory(tree: Path) -> None:
    assert names(tree, str(tree)) == ["a.MD", "b.txt", "sub/c.jsonl.gz", "sub/d.htm"]


def test_files_by_name_and_globs(tree: Path) -> None:
    assert names(tree, str(tree / "code.py")) == ["code.py"]
    assert names(tree, str(tree / "*.py")) == ["code.py"]
    assert names(tree, str(tree / "*")) == ["a.MD", "b.txt"]
    assert names(tree, str(tree / "**" / "*.htm")) == ["sub/d.htm"]


def test_no_file_twice_and_the_users_order(tree: Path) -> None:
    found = names(tree, str(tree / "sub"), str(tree), str(tree / "b.txt"))
    assert found == ["sub/c.jsonl.gz", "sub/d.htm", "a.MD", "b.txt"]


def test_a_file_named_like_a_glob(tmp_path: Path) -> None:
    path = tmp_path / "notes[1].txt"
    path.write_text("x", encoding="utf-8")
    assert expand([str(path)]) == [FileSource(path)]


def test_what_is_not_there(tree: Path) -> None:
    with pytest.raises(UserError, match=r"no file or directory .*did you mean 'b\.txt'"):
        expand([str(tree / "b.text")])
    with pytest.raises(UserError, match="no text file matches"):
        expand([str(tree / "*.csv")])
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match="holds no text files"):
        expand([str(tree / "empty")])
    with pytest.raises(UsageError, match="names no data set"):
        expand(["hf:"])


def documents(path: Path) -> tuple[list[Document], Notes]:
    notes = Notes()
    return list(FileSource(path).documents("text", notes)), notes


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / "b.html").write_bytes(b"<p>para</p>")
    (tmp_path / "c.log").write_bytes(b"<p>line</p>\r\n")
    texts = [
        [d.text for d in documents(tmp_path / n)[0]] for n in ("a.jsonl.gz", "b.html", "c.log")
    ]
    assert texts == [["one", "two"], ["para\n"], ["<p>line</p>\r\n"]]


def test_a_large_file_comes_in_pieces(tmp_path: Path) -> None:
    text = "é" * (BLOCK + 10)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces, _ = documents(tmp_path / "a.txt")
    assert [piece.continues for piece in pieces] == [False, True, True]
    assert "".join(piece.text for piece in pieces) == text


def test_a_bad_page_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(b"<p>\xff</p>")
    found, notes = documents(tmp_path / "a.html")
    assert found == []
    assert len(notes.problems) == 1


def test_a_bad_byte_far_into_records_is_what_is_told(tmp_path: Path) -> None:
    line = b'{"text": "' + b"x" * 990 + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(line * 1100 + b'{"text": "\xff"}\n')
    _, notes = documents(tmp_path / "a.jsonl")
    (problem,) = notes.problems
    assert f"at offset {len(line) * 1100 + 10:,}" in problem


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc")
    first = FileSource(path).fingerprint()
    assert first.size == 3
    assert first.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"abd")
    assert FileSource(path).fingerprint() != first


def test_builtin() -> None:
    assert expand([]) == [BuiltinSource()]
    modules = dict(standard_library())
    assert {"json", "json.decoder", "collections", "os"} <= modules.keys()
    assert not any("test" in name.split(".") or "idlelib" in name for name in modules)
    assert list(modules) == sorted(modules)
    before = set(sys.modules)
    found = {d.name: d.text for d in BuiltinSource().documents("text", Notes())}
    assert set(sys.modules) - before <= {"pydoc_data", "pydoc_data.topics"}
    assert "topic:with" in found
    assert "def dumps(obj, *, skipkeys=False" in found["module:json"]
    assert sum(map(len, found.values())) > 1_500_000
    assert BuiltinSource().fingerprint() == BuiltinSource().fingerprint()


def test_docstrings() -> None:
    source = '''"""Module."""
class A(Base):
    """Class."""
    async def m(self, x: int = 1):
        """Method.

            More."""
    def silent(self): ...
'''
    assert module_docstrings("pkg", source.encode()) == (
        "pkg\n\nModule.\n\n\nclass A(Base):\n    Class.\n\n\n"
        "def A.m(self, x: int=1):\n    Method.\n\n    More.\n"
    )
    assert module_docstrings("pkg", b"x = 1") == ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A stand-in for the package ``datasets``, which needs a network; the calls it got."""
    calls: list[tuple] = []

    def load_dataset(path: str, name: str | None, *, split: str) -> list[dict[str, str]]:
        calls.append((path, name, split))
        if split == "none":
            raise ValueError("Unknown split\nmore")
        return [{"text": "one"}, {"text": "two"}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub(hub: list[tuple]) -> None:
    (source,) = expand(["hf:owner/name@config:test"])
    found = list(source.documents("text", Notes()))
    assert [(d.name, d.text) for d in found] == [
        ("hf:owner/name@config:test[0]", "one"),
        ("hf:owner/name@config:test[1]", "two"),
    ]
    assert hub == [("owner/name", "config", "test")]
    assert source.fingerprint() == source.fingerprint()
    assert HubSource.parse("hf:name").split == "train"
    with pytest.raises(UserError, match=r"cannot load hf:x:none: Unknown split$"):
        expand(["hf:x:none"])[0].fingerprint()


def test_hub_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'cllm\[hf\]'"):
        expand(["hf:name"])[0].fingerprint()
