"""The house: each floor imports from the floors below it alone, and files stay readable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cllm

HOUSE = Path(cllm.__file__).parent
FLOORS = [
    "core",
    "lattice",
    "text",
    "model",
    "store",
    "infer",
    "training",
    "compress",
    "export",
    "bench",
]
ROOF = {"api", "cli", "__init__", "__main__"}
FILES = sorted(HOUSE.rglob("*.py"))
LONGEST = 350  # most files are under 300 lines


def modules(file: Path) -> Iterator[tuple[int, str]]:
    """(line, ``cllm`` module) of every import in a file, those inside functions included."""
    package = ["cllm", *file.relative_to(HOUSE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in found if name.split(".")[0] == "cllm")


def floor(name: str) -> str:
    """The floor that ``cllm.a.b`` is on."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_all_files_are_on_a_floor() -> None:
    floors = {file.relative_to(HOUSE).parts[0].removesuffix(".py") for file in FILES}
    assert floors <= set(FLOORS) | ROOF
    assert {"core", "training", "api", "cli"} <= floors


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(HOUSE)))
def test_a_floor_imports_from_below(file: Path) -> None:
    mine = file.relative_to(HOUSE).parts[0].removesuffix(".py")
    if mine in ROOF:
        return
    allowed = FLOORS[: FLOORS.index(mine) + 1]
    if mine == "lattice":
        allowed = ["lattice"]  # usable on its own
    for line, name in modules(file):
        if name == "cllm.__version__":
            continue
        assert floor(name) in allowed, f"line {line}: {mine} imports {name}"


def test_imports_inside_functions_and_relative_ones_are_seen() -> None:
    file = HOUSE / "core" / "made_up.py"
    text = "def f():\n    from ..training import step\n    import cllm.bench.harness\nfrom . import cpu\n"
    tree = Path.read_text
    try:
        Path.read_text = lambda self, **named: text  # type: ignore[method-assign, assignment]
        found = sorted(name for _, name in modules(file))
    finally:
        Path.read_text = tree  # type: ignore[method-assign]
    assert found == ["cllm.bench.harness", "cllm.core.cpu", "cllm.training.step"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(HOUSE)))
def test_a_file_can_be_held_in_the_head(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert ast.get_docstring(ast.parse(text)), "a file begins with what it is"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(HOUSE)))
def test_what_a_user_calls_has_a_docstring(file: Path) -> None:
    if file.relative_to(HOUSE).parts[0] in ("bench",):
        return
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not missing
