"""Once a step has been made, nothing outside the model's own graph allocates: torch's profiler says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cllm.core.machine import cannot_compile
from cllm.training.feed import MicroBatches
from cllm.training.step import TrainStep

Steps = Callable[..., TrainStep]
Batches = Callable[..., MicroBatches]
Allocations = Callable[..., tuple[int, int]]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("dtype", "fields", "count"),
    [
        (torch.float32, {}, 1),
        (torch.float32, {"norm": "batchnorm"}, 3),
        (torch.bfloat16, {"tie_embeddings": False}, 1),
        (torch.float16, {}, 2),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_an_eager_step_allocates_in_the_graph_only(
    threads: int,
    dtype: torch.dtype,
    fields: dict[str, Any],
    count: int,
    optimizer: str,
    step_of: Steps,
    batches_of: Batches,
    allocations: Allocations,
) -> None:
    torch.set_num_threads(threads)
    step, batches = (
        step_of(dtype=dtype, train={"optimizer": optimizer}, **fields),
        batches_of(count),
    )
    step(batches, 1e-3)
    outside, inside = allocations(step, lambda number: batches)
    assert outside == 0
    assert inside > 0


@pytest.mark.slow
def test_a_compiled_step_allocates_in_the_graph_only(
    step_of: Steps,
    batches_of: Batches,
    allocations: Allocations,
    cache: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if cannot_compile():
        pytest.skip(str(cannot_compile()))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{cache}/inductor")
    step, batches = step_of(dtype=torch.float32, n_layers=1, compiled=True), batches_of()
    step(batches, 1e-3)
    outside, inside = allocations(step, lambda number: batches)
    assert outside == 0
    assert inside > 0


def test_the_buffers_are_aligned_and_stay_where_they_are(
    step_of: Steps, batches_of: Batches
) -> None:
    step = step_of(dtype=torch.bfloat16)
    arena = step.arena
    flat = [arena.weights, arena.compute, arena.grad, *arena.moments.values()]
    places = [tensor.data_ptr() for tensor in flat]
    assert not any(place % 64 for place in places)
    for _ in range(3):
        step(batches_of(), 1e-3)
    now = [arena.weights, arena.compute, arena.grad, *arena.moments.values()]
    assert [tensor.data_ptr() for tensor in now] == places
    parameters = dict(step.model.named_parameters())
    for name, view in arena.layout.views(arena.weights).items():
        assert parameters[name].data_ptr() == view.data_ptr()
