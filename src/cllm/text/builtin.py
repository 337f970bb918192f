"""The built-in corpus: what every CPython ships in English, without a network or a bundled file.

The language reference (``pydoc_data.topics``) and the docstrings of the standard library, read from
its source files; no module is imported and no code of theirs runs.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cllm.core.errors import UserError
from cllm.text.document import Document
from cllm.text.fingerprint import Fingerprint
from cllm.text.notes import Notes

_SKIPPED = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "idle_test",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class BuiltinSource:
    """The corpus as a source; one document for each topic and each module."""

    name: str = "built-in"

    def fingerprint(self) -> Fingerprint:
        """Size and SHA-256 of the topics and of the source files that docstrings are taken from."""
        digest, size = hashlib.sha256(), 0
        blobs = ((path.as_posix(), path.read_bytes()) for _, path in standard_library())
        topics = ((name, text.encode("utf-8")) for name, text in language_reference())
        for name, data in (*topics, *blobs):
            digest.update(name.rsplit("/", 1)[-1].encode("utf-8") + b"\0" + data)
            size += len(data)
        return Fingerprint(self.name, size, digest.hexdigest())

    def documents(self, field: str, notes: Notes) -> Iterator[Document]:
        """Topics, then modules, each in the order of their names."""
        found = False
        for name, text in language_reference():
            yield Document(f"topic:{name}", text)
        for name, path in standard_library():
            if text := module_docstrings(name, path.read_bytes()):
                found = True
                yield Document(f"module:{name}", text)
        if not found:
            raise UserError(
                "this Python has no source files of its standard library to read docstrings from; "
                "give your own text with --data"
            )


def language_reference() -> Iterator[tuple[str, str]]:
    """(name, text) of the topics of the language reference, by name."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield name, topics[name].strip() + "\n"


def standard_library() -> Iterator[tuple[str, Path]]:
    """(module, source file) of the standard library by module name, tests and tools left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found = list[tuple[str, Path]]()
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED.intersection(parts) and not parts[0].startswith("config-"):
            found.append((".".join(parts).removesuffix(".__init__"), path))
    yield from sorted(found)


def module_docstrings(name: str, source: bytes) -> str:
    """The docstrings of a module, each under its definition's first line; empty if it has none."""
    tree = ast.parse(source)
    parts = list[str]()
    if text := ast.get_docstring(tree):
        parts.append(f"{name}\n\n{text}")
    parts += _definitions(tree, "")
    return "\n\n\n".join(parts) + "\n" if parts else ""


def _definitions(tree: ast.Module | _Definition, prefix: str) -> Iterator[str]:
    for node in tree.body:
        if not isinstance(node, _Definition):
            continue
        if text := ast.get_docstring(node):
            indented = "\n".join(f"    {line}" if line else "" for line in text.split("\n"))
            yield f"{_heading(node, prefix)}\n{indented}"
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{prefix}{node.name}.")


def _heading(node: _Definition, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {prefix}{node.name}" + (f"({bases}):" if bases else ":")
    return f"def {prefix}{node.name}({ast.unparse(node.args)}):"
