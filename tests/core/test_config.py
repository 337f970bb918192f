"""The configuration: frozen, validated, and what its combinations refuse."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cllm.core.config import Config, known_keys, require_known
from cllm.core.errors import UsageError
from cllm.core.model_config import ModelConfig
from cllm.core.presets import PRESETS, preset_fields
from cllm.core.settings import build


def test_the_defaults_are_the_demo() -> None:
    config = Config()
    tiny = {name: getattr(config.model, name) for name in PRESETS["tiny"]}
    assert tiny == PRESETS["tiny"]
    assert config.tokenizer.vocab_size == 4096
    assert (config.model.norm, config.model.mlp, config.model.positions) == (
        "rmsnorm",
        "swiglu",
        "rope",
    )
    assert config.model.tie_embeddings


def test_a_section_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_a_valid_shape_of_aligned_widths(name: str) -> None:
    model = build({"model.preset": name}).model
    assert {field: getattr(model, field) for field in PRESETS[name]} == PRESETS[name]
    for width in (model.d_model, model.d_ff, model.head_dim):
        assert width % 32 == 0
    assert model.preset == name


def test_a_field_beside_a_preset_wins() -> None:
    model = build({"model.preset": "small", "model.n_layers": 3}).model
    assert (model.n_layers, model.d_model) == (3, 384)


def test_changing_a_preset_fills_its_fields_in() -> None:
    config = build({"model.d_ff": 100, "train.lr": 0.5}).replace(
        model__preset="nano", model__d_ff=64
    )
    assert (config.model.d_model, config.model.d_ff, config.train.lr) == (64, 64, 0.5)


def test_heads_are_resolved() -> None:
    model = ModelConfig(d_model=96, n_heads=6, n_kv_heads=2)
    assert (model.head_dim, model.kv_heads) == (16, 2)
    assert ModelConfig(n_heads=4).kv_heads == 4


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"model.n_heads": 5},
        "model.d_model = 128 is not a multiple of model.n_heads = 5; change one",
    ),
    (
        {"model.n_kv_heads": 3},
        "n_heads = 4 is not a multiple of model.n_kv_heads = 3; choose a divisor",
    ),
    ({"model.d_model": 12, "model.n_heads": 4}, "or set model.positions = 'learned'"),
    ({"model.norm": "batchnorm", "train.batch_size": 1}, "train.batch_size must be at least 2"),
    ({"train.steps": 10, "train.warmup": 10}, "leaves nothing of train.steps = 10; lower it"),
    ({"data.validation": 0.5, "data.test": 0.4}, "must leave at least a tenth for training"),
    ({"train.device": "gpu"}, "none of auto, cpu, cuda, cuda:N, mps"),
    ({"train.device": "cuda:"}, "none of auto, cpu, cuda, cuda:N, mps"),
    ({"train.lr": 0.0}, "train.lr = 0.0: input should be greater than 0"),
    ({"train.lr": float("nan")}, "train.lr = nan: input should be a finite number"),
    (
        {"train.min_improvement": float("inf")},
        "train.min_improvement = inf: input should be a finite",
    ),
    ({"train.betas": [0.9, 1.0]}, "train.betas = 1.0: input should be less than 1"),
    ({"train.threads": 0}, "train.threads = 0"),
    ({"train.threads": "many"}, "train.threads = 'many'"),
    ({"train.loss_chunk": -1}, "train.loss_chunk = -1"),
    ({"train.seed": -1}, "train.seed = -1"),
    ({"train.optimizer": "adam"}, "train.optimizer = 'adam': input should be 'adamw' or 'sgd'"),
    ({"model.vocab_size": 1}, "model.vocab_size = 1: input should be greater than or equal to 2"),
    ({"model.norm": "rms"}, "model.norm = 'rms': input should be 'rmsnorm', 'layernorm' or"),
    ({"model.norm_eps": -1.0}, "model.norm_eps = -1.0: input should be greater than 0"),
    ({"model.residual_dropout": 1.0}, "model.residual_dropout = 1.0: input should be less than 1"),
    (
        {"model.embedding.init_std": 0},
        "model.embedding.init_std = 0: input should be greater than 0",
    ),
    ({"tokenizer.vocab_size": 256}, "tokenizer.vocab_size = 256"),
    ({"model.preset": "huge"}, "unknown preset 'huge'"),
    ({"data.paths": ("a\udce9",)}, r"the name 'a\udce9' is no valid text"),
]


@pytest.mark.parametrize(("flat", "message"), REFUSED, ids=lambda value: str(value)[:45])
def test_what_cannot_be_is_refused_in_one_line_that_names_it(
    flat: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        build(flat)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_learned_positions_allow_odd_heads() -> None:
    flat = {"model.d_model": 12, "model.n_heads": 4, "model.positions": "learned"}
    assert build(flat).model.head_dim == 3


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.lrr", "did you mean 'train.lr'"),
        ("trian.steps", "did you mean 'train.steps'"),
        ("steps", "did you mean 'train.steps'"),
        ("rank", "`cllm config show` lists all"),
        ("model.n_head", "did you mean 'model.n_heads'"),
        ("train", "unknown setting 'train'"),
        ("", "unknown setting ''"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key: str, hint: str) -> None:
    with pytest.raises(UsageError, match="unknown setting") as error:
        require_known(key)
    assert hint in str(error.value)


def test_all_keys_are_known_and_have_a_meaning() -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys))
    assert {"model.embedding.kind", "data.paths", "log.every"} <= set(keys)
    for key in keys:
        require_known(key)


def test_preset_fields_are_a_copy() -> None:
    preset_fields("nano")["d_model"] = 0
    assert PRESETS["nano"]["d_model"] == 64
