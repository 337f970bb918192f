"""The end of a step in stretches is the end of a step, bit for bit, whoever does them."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cllm.core.config import Config
from cllm.core.shared_memory import SharedMemory
from cllm.training.arena import Arena
from cllm.training.clipping import BLOCKS, Norm
from cllm.training.optimizer import OPTIMIZERS
from cllm.training.parallel.ending import Ending
from cllm.training.parallel.shared import Shared
from cllm.training.update import Update

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memfd")


class Model(nn.Module):
    """A matrix of ``size`` times 3 numbers, a vector, and a matrix again."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Linear(3, size, bias=False),
            nn.LayerNorm(size),
            nn.Linear(size, 2),
        )


def started(config: Config, size: int, dtype: torch.dtype, memory: SharedMemory | None) -> Update:
    """What ends the steps of a model whose weights and moments are of one seed."""
    torch.manual_seed(3)
    moments = OPTIMIZERS[config.train.optimizer].moments
    arena = Arena.adopt(Model(size), dtype, moments, memory=memory)
    for flat in arena.moments.values():
        flat.copy_(torch.rand_like(flat))
    return Update(arena, config.train)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(size=st.integers(1, 2500), workers=st.integers(1, 80), clip=st.sampled_from([0.0, 0.1]))
def test_stretches_make_the_whole(
    optimizer: str, dtype: torch.dtype, size: int, workers: int, clip: float
) -> None:
    changes: dict[str, Any] = {"optimizer": optimizer, "clip": clip, "batch_size": workers}
    changes |= {"parallel": {"workers": workers}}
    config = Config.model_validate({"model": {"vocab_size": 300, "context": 4}, "train": changes})
    alone = started(config, size, dtype, None)
    memory = SharedMemory.create(4 * (workers + 8) * (len(alone.arena.weights) + 64) + 2**20)
    together = started(config, size, dtype, memory)
    shared = Shared(memory, config, together.arena, {})
    grads = [torch.randn_like(alone.arena.grad) for _ in range(workers)]
    for place, grad in zip(shared.grads, grads, strict=True):
        place.copy_(grad)
    for grad in grads[1:]:
        grads[0] += grad
    norm = alone.norm(grads[0])
    factor = alone.apply(grads[0], norm, 0.5, 1e-2, 7)
    endings = [Ending(together, shared, number) for number in range(workers)]
    for one in reversed(endings):
        one.add_up()
    assert endings[0].norm.total() == norm
    for one in reversed(endings):
        one.apply(factor, 1e-2, 7)
    assert torch.equal(together.arena.weights, alone.arena.weights)
    assert torch.equal(together.arena.compute, alone.arena.compute)
    for name, flat in together.arena.moments.items():
        assert torch.equal(flat, alone.arena.moments[name])


@given(size=st.integers(0, 5000), cuts=st.lists(st.integers(0, BLOCKS + 1)))
def test_norms_of_blocks_are_those_of_all(size: int, cuts: list[int]) -> None:
    grad = torch.randn(size, generator=torch.Generator().manual_seed(size))
    whole, pieces = Norm(grad), Norm(grad, torch.full((BLOCKS + 1,), torch.nan))
    ends = [0, *sorted(cuts), BLOCKS + 1]
    for first, last in pairwise(ends):
        pieces.take(grad, first, last)
    assert pieces.total() == whole(grad)
    assert whole(grad) == pytest.approx(float(grad.double().norm()), rel=1e-5)
