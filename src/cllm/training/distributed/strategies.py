"""From a configuration to the strategy it names."""

from __future__ import annotations

from cllm.core.config import Config
from cllm.training.distributed.member import Member
from cllm.training.step import TrainStep


def make_member(config: Config, size: int, step: TrainStep | None) -> Member:
    """This process's part; all processes must call it at once.

    ``step``: the first process's, which holds the whole model.
    """
    if config.train.pipeline.mode == "stages":
        from cllm.training.distributed.stages import Stages

        return Stages(config, size, step)
    if config.train.parallel.strategy == "fsdp":
        from cllm.training.distributed.shards import Shards

        return Shards(config, size, step)
    from cllm.training.build import build_step
    from cllm.training.distributed.replicas import Replicas

    return Replicas(config, size, build_step(config)[1] if step is None else step)
