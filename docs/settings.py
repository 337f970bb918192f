"""Writes the parts of the documentation that are made from the code (``make docs``).

``docs/settings.md`` is written whole; the table of presets goes between its marks in ``docs/training.md``.
``tests/test_docs.py`` fails where a page is behind the code.
"""

from __future__ import annotations

import re
from pathlib import Path

from cllm.core.config import Config
from cllm.core.presets import PRESETS
from cllm.core.section import Section
from cllm.core.settings import explain, merge
from cllm.model.transformer import parameter_count

DOCS = Path(__file__).parent

HEAD = """# Settings

Every setting of a run, with its default. This page is made from the code by `make docs`. `cllm config
show` prints the same, `cllm config schema` a JSON schema for editors, `cllm config show --toml` a file to
start from.

A setting is given by `--set KEY=VALUE` (`--set train.lr=1e-3`), in a TOML file (`--config FILE.toml`), or
in Python (`cllm.train(train__lr=1e-3)`). Later ones win: defaults, the preset, the file, `--set`. `"auto"`
is chosen for the machine when a run begins ([how](training.md#what-the-machine-chooses-and-why)). An empty
default means none.
"""


def settings_page() -> str:
    """The text of ``docs/settings.md``."""
    config = Config()
    parts = [HEAD.rstrip()]
    section = ""
    for key, value, meaning in explain(config):
        if (here := key.rpartition(".")[0]) != section:
            section = here
            parts += [
                f"\n## {section}\n\n{_about(section)}\n",
                "| key | default | values | meaning |",
            ]
            parts.append("|---|---|---|---|")
        default = f"`{value}`" if value else ""
        parts.append(f"| `{key}` | {default} | {_values(key)} | {meaning.replace('``', '`')} |")
    return "\n".join(parts) + "\n"


def presets_table() -> str:
    """The sizes by name as a Markdown table."""
    lines = ["| preset | d_model | layers | heads | d_ff | context | parameters |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    vocabulary = Config().tokenizer.vocab_size
    for name in PRESETS:
        changes = {"model.preset": name, "model.vocab_size": vocabulary}
        model = merge(Config(), changes).model
        count = parameter_count(model) / 1e6
        lines.append(
            f"| `{name}` | {model.d_model} | {model.n_layers} | {model.n_heads} | {model.d_ff} "
            f"| {model.context} | {count:.2f} M |"
        )
    lines.append(f"\nParameters with a vocabulary of {vocabulary:,} and tied embeddings.")
    return "\n".join(lines)


def training_page() -> str:
    """``docs/training.md`` with the table of presets as the code has it."""
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    marks = re.compile(r"(<!-- presets -->\n).*?(<!-- /presets -->)", re.DOTALL)
    return marks.sub(lambda match: f"{match[1]}{presets_table()}\n{match[2]}", text)


def pages() -> dict[Path, str]:
    """Each page that is made, wholly or in part, and its text."""
    return {DOCS / "settings.md": settings_page(), DOCS / "training.md": training_page()}


def _section(name: str) -> type[Section]:
    section: type[Section] = Config
    for part in name.split("."):
        kind = section.model_fields[part].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, Section)
        section = kind
    return section


def _about(name: str) -> str:
    return (_section(name).__doc__ or "").strip()


def _values(key: str) -> str:
    """What a setting can be, in a few words."""
    section, _, name = key.rpartition(".")
    schema = _section(section).model_json_schema()["properties"][name]
    words = [_kind(each) for each in schema.get("anyOf", [schema])]
    return " or ".join(word for word in words if word)


def _kind(schema: dict[str, object]) -> str:
    if "enum" in schema:
        values = schema["enum"]
        assert isinstance(values, list)
        return ", ".join(f"`{value}`" for value in values)
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "null":
        return ""
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "yes/no"}
    text = names.get(str(schema.get("type")), "list")
    if schema.get("type") == "boolean":
        text = "`true`, `false`"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_number(schema[key])}" for key, sign in signs.items() if key in schema]
    return " ".join([text, ", ".join(bounds)]).strip()


def _number(value: object) -> str:
    assert isinstance(value, int | float)
    whole = int(value)
    power = whole.bit_length() - 1
    if whole == value and power >= 20 and whole == 2**power:
        return f"2^{power}"
    return f"{value:g}"


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
