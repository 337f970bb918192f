"""How much the processes of a torchrun send in a step, computed from shapes."""

from __future__ import annotations

import torch

from cllm.core.config import Config
from cllm.model.transformer import Transformer
from cllm.training.choose import arithmetic
from cllm.training.parallel.shards import deal_evenly


def sent_bytes(config: Config, processes: int) -> int:
    """Bytes that the busiest process sends in a training step, without headers and orders.

    ``ddp``: a ring's all-reduce of the gradient. ``fsdp``: for each of its micro-batches, the weights
    gathered twice and the gradient scattered. Stages: vectors forth, their gradients back, and a tied
    table's gradient. ``config`` must be resolved.
    """
    train, model = config.train, config.model
    with torch.device("meta"):
        named = dict(Transformer(model).named_parameters())
    master = torch.empty(0).element_size()  # float32; float64 in proofs
    weights = sum(p.numel() for p in named.values())
    if train.pipeline.mode == "stages":
        return _between_stages(config, processes, master, named)
    once = weights * (processes - 1) // processes
    if train.parallel.strategy == "ddp":
        return 2 * once * master
    passes = len(deal_evenly(train.batch_size, train.accumulate, processes)[0])
    return passes * once * (2 * arithmetic(train).itemsize + master)


def _between_stages(
    config: Config, processes: int, master: int, named: dict[str, torch.nn.Parameter]
) -> int:
    from cllm.training.distributed.stage_layers import Plan

    train, model, plan = config.train, config.model, Plan(config, processes)
    vectors = train.batch_size * train.accumulate * model.context * model.d_model * master
    sent = [0] * processes
    for here, there in zip(plan.ranks, plan.ranks[1:], strict=False):
        if here != there:
            sent[here] += vectors
            sent[there] += vectors
    first, last = plan.ranks[0], plan.ranks[-1]
    if model.tie_embeddings and first != last:
        table = sum(p.numel() for name, p in named.items() if name.startswith("embedding."))
        sent[first] += table * master
        sent[last] += table * master
    return max(sent)
