"""The documentation is in step with the code: settings, commands, options, links, examples."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

import cllm
from cllm.cli import app
from cllm.core.settings import load_config, parse_setting

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))


def name_of(path: Path) -> str:
    """A path for a test's name."""
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a page in ``language`` (empty: those without one)."""
    found = re.findall(
        r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [text for word, text in found if word == language]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each ``cllm`` command on a page, without ``cllm``."""
    for block in (*blocks(page, "sh"), *blocks(page, "")):
        for line in block.splitlines():
            if line.startswith("cllm "):
                yield shlex.split(line, comments=True)[1:]


def writer() -> ModuleType:
    """``docs/settings.py`` as a module."""
    spec = importlib.util.spec_from_file_location("docs_settings", ROOT / "docs" / "settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_made_pages_are_up_to_date() -> None:
    for path, text in writer().pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is behind the code: make docs"


def parse(words: list[str]) -> dict[str, Any]:
    """Parse ``words`` as the command line would, without running anything; the last command's values.

    Whether typer uses click or its own copy of it depends on its version, so no class of it is named here.
    """
    command, name, values = typer.main.get_command(app), "cllm", {}
    while True:
        context = command.make_context(name, list(words))
        values = context.params
        if not hasattr(command, "resolve_command"):
            return values
        name, command, words = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        line = f"cllm {shlex.join(words)}"
        if "COMMAND" in words or "--help" in words or "--install-completion" in words:
            continue
        try:
            values = parse(words)
        except Exception as error:
            pytest.fail(f"{line}: {getattr(error, 'message', error)!r}")
        for text in values.get("settings") or ():
            parse_setting(text)


def test_parsing_finds_mistakes() -> None:
    assert parse(["train", "--set", "train.lr=1"])["settings"] == ["train.lr=1"]
    for words in (["train", "--nope"], ["runs", "lisst"], ["generate"], ["config", "show", "--x"]):
        with pytest.raises(Exception, match=r".*") as caught:
            parse(words)
        assert hasattr(caught.value, "exit_code")


def test_commands_were_found() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 30


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_named_in_text_exist(page: Path) -> None:
    keys = set(load_keys())
    sections = {key.rpartition(".")[0] for key in keys} | {"model.embedding"}
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:data|tokenizer|model|train|log)\.[a-z_.]+)(?: ?=.*?)?`", text)
    for name in named:
        key = name.rstrip(".")
        known = key in keys or key in sections or name.endswith((".py", ".toml", ".json", ".onnx"))
        assert known, f"{page.name} names {name}"


def load_keys() -> list[str]:
    """All dotted keys."""
    from cllm.core.config import known_keys

    return list(known_keys())


def test_page_of_training_shows_toml_that_loads(tmp_path: Path) -> None:
    for number, block in enumerate(blocks(ROOT / "docs" / "training.md", "toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(block, encoding="utf-8")
        load_config(path)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_examples_load(path: Path) -> None:
    config = load_config(path)
    given = tomllib.loads(path.read_text(encoding="utf-8"))
    assert config.train.lr == given["train"]["lr"]
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#   cllm "):
            assert f"examples/{path.name}" in line
            parse(shlex.split(line[1:])[1:])


def test_examples_were_found() -> None:
    assert len(EXAMPLES) >= 2


def test_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == cllm.__version__


def test_constraints_pin_what_is_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not [version for version in pins.values() if "+" in version]
    assert pins["torch"] == "2.13.0"
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["bench"], *extras["zstd"]]
    names = [re.split(r"[<>=;\[ ]", text)[0] for text in [*wanted, *extras["html"]]]
    pinned = {name.lower().replace("_", "-") for name in pins}
    assert {name.lower() for name in names} - pinned == {"cllm"}
