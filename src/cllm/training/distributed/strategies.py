"""From a configuration to the strategy it names."""

from __future__ import annotations

from cllm.core.config import Config
from cllm.model.transformer import Transformer
from cllm.training.distributed.group import Group
from cllm.training.distributed.member import Member
from cllm.training.step import TrainStep


def make_member(config: Config, model: Transformer, step: TrainStep, group: Group) -> Member:
    """This process's part; all processes must call it at once."""
    if config.train.pipeline.mode == "stages":
        from cllm.training.distributed.stages import Stages

        return Stages(config, model, step, group.size)
    if config.train.parallel.strategy == "fsdp":
        from cllm.training.distributed.shards import Shards

        return Shards(config, model, step, group.size)
    from cllm.training.distributed.replicas import Replicas

    return Replicas(config, model, step, group.size)
