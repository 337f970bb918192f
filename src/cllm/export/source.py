"""What is exported: the model of a run or of a compressed file, its tokenizer, and the facts about it."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm.compress.formats import read_state
from cllm.core.errors import UserError
from cllm.core.model_config import EmbeddingConfig, ModelConfig
from cllm.core.settings import build, flatten, load_whole
from cllm.model.restored import restored
from cllm.model.transformer import Transformer
from cllm.store import checkpoint as checkpoints
from cllm.store import steps
from cllm.store.container import Container, is_container
from cllm.store.run import RunDirectory
from cllm.text.dataset import load_prepared
from cllm.text.tokenizer import Tokenizer

SAMPLE_TOKENS = 4096
"""Held-out tokens that a check looks at, at most."""


@dataclass(frozen=True, eq=False)
class Source:
    """A model to export. ``model`` is in float32 and eval mode; its tables may be of any kind."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    sample: np.ndarray
    """Some held-out token ids (int64), for checks."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the run knows about itself (see ``status.json``), and ``step``."""
    blocks: Mapping[str, tuple[str, np.ndarray]] = field(default_factory=dict)
    """Weights that a compressed file holds in llama.cpp's blocks, by parameter name: ``q4_0`` or ``q8_0``,
    and the rows of bytes (uint8)."""
    data_field: str = "text"
    """The field of JSON lines that the run's text was read from."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config


def open_source(path: Path) -> Source:
    """The run at ``path`` (its best checkpoint), one checkpoint of a run, or a compressed file.

    Raises ``UserError`` if there is none, if a file of it is damaged, and if a weight is not finite.
    """
    if is_container(path):
        return _open_container(path)
    run = RunDirectory.open(path)
    whole = load_whole(run.config)
    config = whole.model
    tokenizer = Tokenizer.load(run.tokenizer)
    step = checkpoints.find_chosen(path)
    loaded = checkpoints.load(step, with_optimizer=False).weights
    weights = {name: _wide(weight) for name, weight in loaded.items()}
    refuse_nonfinite(weights, str(step))
    model = restored(config, weights, step)
    facts = _facts(run, step)
    sample = _sample(run, config)
    field_name = whole.data.field
    return Source(run.name, model, tokenizer, sample, facts, data_field=field_name)


def _open_container(path: Path) -> Source:
    container = Container.open(path)
    whole = build(flatten(tomllib.loads(container.header.config)))
    weights = {name: _wide(weight) for name, weight in read_state(container).items()}
    refuse_nonfinite(weights, str(path))
    model = restored(whole.model, weights, path)
    tokenizer = Tokenizer.from_json(container.tokenizer(), str(path))
    blocks = {
        name: (stored.kind.removeprefix("gguf-"), container.tensor(name).numpy())
        for name, stored in container.header.weights.items()
        if stored.kind.startswith("gguf-")
    }
    return Source(
        path.stem,
        model,
        tokenizer,
        _random_sample(whole.model),
        dict(container.header.source),
        blocks,
        whole.data.field,
    )


def refuse_nonfinite(weights: dict[str, Tensor], where: str) -> None:
    """Raise ``UserError`` naming the first tensor that holds a NaN or an infinity."""
    for name, weight in weights.items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise UserError(
                f"{where}: {name} holds {bad} numbers that are not finite (NaN or infinity); "
                "export another checkpoint of the run"
            )


def plain(model: Transformer, *, factors: bool = False) -> Transformer:
    """The same function with tables that are weights: sums of pieces and snapped rows worked out.

    A table of rank r becomes the (V, D) product, exact but for rounding; with ``factors`` its two
    factors stay apart.
    """
    keep = factors and model.config.embedding.is_reduced
    rank = model.config.embedding.rank_of(model.config.d_model)
    embedding = EmbeddingConfig(kind="reduced", rank=rank) if keep else EmbeddingConfig()
    made = Transformer(model.config.model_copy(update={"embedding": embedding}))
    state = {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name.split(".")[0] not in model.tables
    }
    with torch.no_grad():
        for name, table in model.tables.items():
            state[f"{name}.weight"] = (table.core() if keep else table.table()).clone()
            if keep and table.basis is not None:
                state[f"{name}.basis"] = table.basis.clone()
    made.load_state_dict(state)
    return made.eval()


def rounded(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy whose parameters went through ``dtype`` and back to float32.

    Raises ``UserError`` if one leaves the range of ``dtype``.
    """
    made = copy.deepcopy(model)
    for name, parameter in made.named_parameters():
        parameter.data = parameter.data.to(dtype).float()
        if not bool(torch.isfinite(parameter.data).all()):
            raise UserError(
                f"{name} leaves the range of {str(dtype).split('.')[-1]}; use bf16 or fp32"
            )
    return made


def _wide(weight: Tensor) -> Tensor:
    return weight.float() if weight.is_floating_point() else weight


def _sample(run: RunDirectory, config: ModelConfig) -> np.ndarray:
    """Held-out text where the run has some, else its training text, else random ids."""
    try:
        data = load_prepared(run.data)
    except UserError:
        return _random_sample(config)
    tokens = data.validation or data.train
    return np.asarray(tokens.ids[:SAMPLE_TOKENS], dtype=np.int64)


def _random_sample(config: ModelConfig) -> np.ndarray:
    assert config.vocab_size is not None
    return np.random.default_rng(0).integers(0, config.vocab_size, SAMPLE_TOKENS)


def _facts(run: RunDirectory, step: Path) -> dict[str, Any]:
    """What the run knows; its figures of quality only with the checkpoint that they are of: the best, or
    the last where none was scored before."""
    facts = run.status().facts | {"checkpoint": step.name}
    best = steps.best_step(run.path)
    scored = steps.steps(run.path)[-1] if best is None else best
    if steps.step_of(step) != scored:
        facts = {name: fact for name, fact in facts.items() if not name.endswith("_bpb")}
    return facts
