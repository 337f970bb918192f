"""The trace is the step itself: the same operations, products and buffers as on real tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cllm.core.config import Config
from cllm.model.transformer import flops_per_token, parameter_count
from cllm.training.build import build_step
from cllm.training.gradient import Micro
from cllm.training.plan.roofline import Rates, peak_bytes, step_seconds, tasks_of
from cllm.training.plan.trace import Trace, _recorded, trace_step
from cllm.training.plan.work import products_of, work_of

ConfigOf = Callable[..., Config]
KINDS: list[dict[str, Any]] = [
    {},
    {"model__n_heads": 4, "model__n_kv_heads": 2},
    {"model__mlp": "gelu", "model__norm": "layernorm", "model__positions": "learned"},
    {"model__tie_embeddings": False, "train__dtype": "bf16"},
    {"model__embedding__kind": "reduced", "model__embedding__rank": 8},
    {"train__loss_chunk": 100, "train__optimizer": "sgd"},
]


def on_real_tensors(config: Config) -> Trace:
    """The micro-batch of a real step, recorded."""
    torch.set_num_threads(1)
    model, step = build_step(config)
    model.train()
    ids = torch.zeros(config.train.batch_size, config.model.context, dtype=torch.int64)
    numbers = torch.ones(5)
    with _recorded() as recorder:
        step.gradients.backward(Micro(ids, ids), numbers[0], {})
    return recorder.trace


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_counts_are_those_of_the_literature_and_of_the_real_step(
    changes: dict[str, Any], resolved: ConfigOf, isolated: object
) -> None:
    config = resolved(**changes)
    traced, real = trace_step(config), on_real_tensors(config)
    tokens, each = config.train.batch_size * config.model.context, flops_per_token(config.model)
    if config.model.embedding.is_reduced:  # a basis is a product of the input, too
        each += 6 * config.model.embedding.rank_of(64) * 64
    assert traced.micro.flops == tokens * each
    assert traced.parameters == parameter_count(config.model)
    assert traced.micro.flops == real.flops
    work = [(op.name, op.elements, op.product) for op in real.operations if op.product]
    assert work == [
        (op.name, op.elements, op.product) for op in traced.micro.operations if op.product
    ]
    assert traced.micro.peak == pytest.approx(real.peak, rel=0.02)


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_any_number_of_layers_follows_from_two_and_three(compiled: str, resolved: ConfigOf) -> None:
    config = resolved(model__n_layers=7, train__compile=compiled)
    rates = Rates(flops=1e11, stream=[(1.0, 1e10)], products={}, heavy=1e-9, call=1e-6)
    work, whole = work_of(config, rates), trace_step(config)
    fused = compiled == "on"
    assert work.flops.of(7) == whole.micro.flops
    assert work.parameters.of(7) == whole.parameters
    assert work.arena.of(7) == whole.arena
    assert work.micro.of(7) == pytest.approx(step_seconds(whole.micro, rates, fused), rel=0.01)
    assert work.end.of(7) == pytest.approx(step_seconds(whole.end, rates, fused), rel=0.01)
    assert work.activations.of(7) == pytest.approx(max(peak_bytes(whole.micro, fused)), rel=0.01)
    assert set(products_of(config)) == {op.product for op in whole.micro.operations} - {None}


def test_fused_code_moves_and_holds_less(resolved: ConfigOf) -> None:
    trace = trace_step(resolved()).micro
    eager, fused = tasks_of(trace, False), tasks_of(trace, True)
    moved = [sum(t.bytes for t in tasks if t.product is None) for tasks in (eager, fused)]
    assert moved[1] < 0.6 * moved[0]
    assert [t.product for t in eager if t.product] == [t.product for t in fused if t.product]
    assert len(fused) < len(eager) / 4
    assert peak_bytes(trace, True)[0] < peak_bytes(trace, False)[0]
    assert peak_bytes(trace, True)[0] > 4 * 4 * 64 * 300  # the logits at least


def test_weights_are_read_and_no_buffer_of_the_step_is_lost(resolved: ConfigOf) -> None:
    trace = trace_step(resolved())
    weights = 4 * trace.arena
    (last,) = [op for op in trace.micro.operations if set(op.writes) & trace.micro.lasting][-1:]
    assert max(last.writes.values()) == weights  # the flat gradient
    assert any(buffer < 0 for op in trace.end.operations for buffer in op.writes)


def test_bandwidth_lies_between_what_was_measured() -> None:
    rates = Rates(flops=1.0, stream=[(1e6, 4e10), (1e8, 1e10)], products={})
    assert rates.bandwidth(1) == 4e10
    assert rates.bandwidth(1e6) == 4e10
    assert rates.bandwidth(1e7) == pytest.approx(2.5e10)
    assert rates.bandwidth(1e12) == 1e10
