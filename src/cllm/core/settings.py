"""Reading and writing a configuration: TOML files, ``key=value`` settings, presets.

Later sources win: defaults, then the preset, then the file, then ``--set``. Every mistake is a
``UsageError`` that names the key.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cllm.core.config import Config, known_keys, require_known
from cllm.core.errors import SettingError, UsageError, UserError
from cllm.core.presets import preset_fields
from cllm.core.section import Section


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train": {"lr": 1}}`` as ``{"train.lr": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        here = nested
        for part in path:
            here = here.setdefault(part, {})
        here[last] = value
    return nested


def build(flat: Mapping[str, Any]) -> Config:
    """A validated ``Config`` from dotted keys, the preset filled in below them.

    Raises ``UsageError`` for an unknown key, a wrong value or a combination that cannot be: for the latter
    two ``SettingError``, which is a ``ValueError``, too.
    """
    for key in flat:
        require_known(key)
    values = dict(flat)
    if values.get("model.preset") is not None:
        sizes = preset_fields(str(values["model.preset"]))
        values = {f"model.{name}": size for name, size in sizes.items()} | values
    try:
        return Config.model_validate(nest(values))
    except ValidationError as error:
        raise SettingError(_one_line(error)) from error


def merge(config: Config, changes: Mapping[str, Any]) -> Config:
    """``config`` with the dotted keys of ``changes`` set, validated as a whole."""
    base = flatten(config.model_dump())
    if changes.get("model.preset") is not None:
        sizes = preset_fields(str(changes["model.preset"]))
        base |= {f"model.{name}": size for name, size in sizes.items()}
    return build(base | dict(changes))


def parse_setting(text: str) -> tuple[str, Any]:
    """``key=value`` with a TOML value; a bare word counts as a string.

    Raises ``UsageError`` if there is no ``=`` or the key is unknown.
    """
    key, sign, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not sign or not key:
        raise UsageError(f"--set wants key=value, not {text!r}")
    require_known(key)
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    return key, value


def write_setting(key: str, value: Any) -> str:
    """The ``key=value`` that ``parse_setting`` reads back to ``value``."""
    return f"{key}={_toml_value(value)}"


def read_toml(path: Path) -> dict[str, Any]:
    """Dotted keys of a TOML file. Raises ``UsageError`` naming the file."""
    try:
        return flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error


def load_config(path: Path | None = None, settings: Iterable[str] = ()) -> Config:
    """The configuration of an optional TOML file with ``key=value`` settings over it."""
    flat = read_toml(path) if path is not None else {}
    return build(flat | dict(parse_setting(text) for text in settings))


def load_whole(path: Path) -> Config:
    """The configuration in a ``run.toml``, which ``to_toml`` wrote.

    Raises ``UserError`` if its end is missing: what is left would be filled up with defaults.
    """
    flat = read_toml(path)
    sections = {key.partition(".")[0] for key in flat}
    missing = [name for name in Config.model_fields if name not in sections]
    if missing or not path.read_bytes().endswith(b"\n"):
        what = f"it has no [{missing[0]}]" if missing else "its last line has no end"
        raise UserError(
            f"{path} is cut short ({what}): put back a copy of it, or the run.toml of a run with the same "
            "settings"
        )
    return build(flat)


def to_toml(config: Config) -> str:
    """The whole configuration as TOML that ``load_config`` reads back to an equal object.

    Keys without a value (``None``) are left out, as TOML has no null.
    """
    sections: dict[str, list[str]] = {}
    for key, value in flatten(config.model_dump()).items():
        section, _, name = key.rpartition(".")
        if value is not None:
            sections.setdefault(section, []).append(f"{name} = {_toml_value(value)}")
    return "\n\n".join(f"[{name}]\n" + "\n".join(lines) for name, lines in sections.items()) + "\n"


def explain(config: Config) -> list[tuple[str, str, str]]:
    """(dotted key, value, meaning) of every setting, for ``cllm config show``."""
    values = flatten(config.model_dump())
    rows = []
    for key in known_keys():
        section: type[Section] = Config
        *path, last = key.split(".")
        for part in path:
            kind = section.model_fields[part].annotation
            assert isinstance(kind, type)
            assert issubclass(kind, Section)
            section = kind
        meaning = " ".join((section.model_fields[last].description or "").split())
        value = values[key]
        rows.append((key, "" if value is None else _toml_value(value), meaning))
    return rows


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # JSON's booleans, numbers and strings are TOML's too, but TOML has no \u0000-free guarantee for
    # surrogates, hence ensure_ascii=False; DEL is the one character JSON leaves bare and TOML forbids.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _one_line(error: ValidationError) -> str:
    """The first mistake pydantic found, as one line that names the key."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    if first["type"] == "value_error":
        return message
    where = next((key for key in known_keys() if f"{where}.".startswith(f"{key}.")), where)
    return f"{where} = {given!r}: {message[0].lower()}{message[1:]}"
