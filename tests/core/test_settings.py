"""TOML and ``key=value`` settings: there and back again."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.core.config import Config, known_keys
from cllm.core.errors import UsageError, UserError
from cllm.core.settings import (
    build,
    explain,
    flatten,
    load_config,
    merge,
    nest,
    parse_setting,
    read_toml,
    to_toml,
    write_setting,
)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.lr=1e-3", "train.lr", 0.001),
        (" train.steps = 5 ", "train.steps", 5),
        ("train.dtype=bf16", "train.dtype", "bf16"),
        ('train.dtype="bf16"', "train.dtype", "bf16"),
        ("log.tensorboard=false", "log.tensorboard", False),
        ('data.paths=["a", "b=c"]', "data.paths", ["a", "b=c"]),
        ("tokenizer.file=C:\\new\\t.json", "tokenizer.file", "C:\\new\\t.json"),
        ("data.field=a=b", "data.field", "a=b"),
        ("data.field=", "data.field", ""),
        ("train.steps=1_000", "train.steps", 1000),
    ],
)
def test_a_setting_is_toml_or_a_bare_word(text: str, key: str, value: object) -> None:
    assert parse_setting(text) == (key, value)


@pytest.mark.parametrize("text", ["train.lr", "=3", "", "train.lr 3"])
def test_a_setting_without_a_sign_or_a_key_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--set wants key=value"):
        parse_setting(text)


@pytest.mark.parametrize("value", [1e-3, 5, "bf16", "a = 'b' \"c\"", False, [0.8, 0.9], (0.8, 0.9)])
def test_a_setting_that_is_written_is_read_back(value: object) -> None:
    expected = list(value) if isinstance(value, tuple) else value
    assert parse_setting(write_setting("train.lr", value)) == ("train.lr", expected)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    paths=st.lists(NAMES, max_size=3),
    field=NAMES,
    lr=st.floats(1e-12, 1e9),
    eps=st.floats(5e-324, 1.0),
    seed=st.integers(0, 2**63 - 1),
    special=st.lists(NAMES.filter(bool), max_size=2),
    threads=st.one_of(st.just("auto"), st.integers(1, 64)),
)
def test_any_configuration_is_the_same_after_toml(
    paths: list[str],
    field: str,
    lr: float,
    eps: float,
    seed: int,
    special: list[str],
    threads: str | int,
) -> None:
    config = build(
        {
            "data.paths": paths,
            "data.field": field,
            "train.lr": lr,
            "train.eps": eps,
            "train.seed": seed,
            "train.threads": threads,
            "tokenizer.special_tokens": special,
            "model.preset": "nano",
            "model.d_ff": 70,
        }
    )
    assert build(flatten(tomllib.loads(to_toml(config)))) == config


def test_a_file_comes_over_the_defaults_and_settings_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[train]\nlr = 0.5\nsteps = 7\n[model]\npreset = 'nano'\nn_layers = 5\n")
    config = load_config(file, ["train.steps=9", "model.d_ff=40"])
    assert (config.train.lr, config.train.steps) == (0.5, 9)
    assert (config.model.n_layers, config.model.d_ff, config.model.d_model) == (5, 40, 64)
    assert load_config(file, ["model.preset=small"]).model.d_model == 384
    assert load_config() == Config()


def test_merging_keeps_what_is_not_named() -> None:
    config = build({"train.lr": 0.5, "model.preset": "nano"})
    merged = merge(config, {"train.steps": 3})
    assert merged.train.lr == 0.5
    assert merged.model == config.model
    with pytest.raises(UsageError, match="unknown setting"):
        merge(config, {"train.step": 3})


@given(st.dictionaries(st.sampled_from(known_keys()), st.integers()))
def test_nesting_is_the_inverse_of_flattening(flat: dict[str, int]) -> None:
    assert flatten(nest(flat)) == flat


def test_every_setting_is_explained() -> None:
    rows = explain(Config())
    assert [key for key, _, _ in rows] == list(known_keys())
    meanings = {key: meaning for key, _, meaning in rows}
    assert meanings["train.lr"] == "Peak learning rate."
    values = {key: value for key, value, _ in rows}
    assert (values["train.lr"], values["model.n_kv_heads"], values["data.paths"]) == (
        "0.003",
        "",
        "[]",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[train\n", "is not valid TOML"),
        (b"a = 1\na = 2\n", "is not valid TOML"),
        (b"\xff\xfe", "cannot read"),
        (None, "there is no configuration file"),
    ],
)
def test_a_wrong_file_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_toml(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
