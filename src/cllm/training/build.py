"""From a resolved configuration to a model and its training step, in one process or several."""

from __future__ import annotations

import os
from contextlib import suppress

import torch

from cllm.core.allocator import keep_freed_memory
from cllm.core.config import Config
from cllm.core.machine import cache_dir
from cllm.core.shared_memory import SharedMemory
from cllm.core.torchrun import launched
from cllm.model.transformer import Transformer
from cllm.training.arena import Arena
from cllm.training.choose import arithmetic
from cllm.training.distributed.check import runs_eagerly
from cllm.training.draws import Draws
from cllm.training.lazy_rows import idling_tables
from cllm.training.optimizer import OPTIMIZERS
from cllm.training.parallel.crew import Crew
from cllm.training.parallel.shared import reserve
from cllm.training.step import TrainStep


def build(config: Config, draws: Draws | None = None) -> tuple[Transformer, TrainStep]:
    """The model with its random start and its training step, on the configured device.

    ``config`` must be resolved (see ``cllm.training.choose``). ``draws``: what its steps draw from; with
    none they are on the exact loss alone. Sets torch's number of threads. Workers begin with the first
    step, and end with ``step.close()``.
    """
    assert config.train.loss == "exact" or draws is not None
    if launched() is not None and runs_eagerly(config.train):
        # Devices hold the shares; the whole model is for what the first process does alone.
        config = config.replace(**{"train.device": "cpu"})
    if config.train.parallel.workers == 1:
        return build_step(config, draws=draws)
    memory = reserve(config)
    model, step = build_step(config, memory)
    step.crew = Crew(config, memory, model, step.update, step.cores)
    return model, step


def build_step(
    config: Config,
    memory: SharedMemory | None = None,
    *,
    owner: bool = True,
    draws: Draws | None = None,
) -> tuple[Transformer, TrainStep]:
    """The same for one process, with its weights in ``memory`` if that is given (see ``Arena.adopt``)."""
    train = config.train
    assert isinstance(train.threads, int)
    assert isinstance(train.loss_chunk, int)
    torch.set_num_threads(train.threads)
    keep_freed_memory()
    # A place of ours, so that the compiled code outlives the system's temporary files.
    with suppress(OSError):
        (cache_dir() / "inductor").mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
    model = Transformer(config.model, attention=train.attention)
    if owner:
        model.start(train.seed)
    model.to(train.device)
    arena = Arena.adopt(
        model,
        arithmetic(train),
        OPTIMIZERS[train.optimizer].moments,
        idling_tables(train, config.model.tie_embeddings),
        memory,
        owner,
    )
    compiled = train.compile == "on"
    step = TrainStep(model, arena, train, chunk=train.loss_chunk, compiled=compiled, draws=draws)
    return model, step
