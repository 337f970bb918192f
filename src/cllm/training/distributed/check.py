"""What cannot be trained by several processes, refused before any of them begins."""

from __future__ import annotations

from cllm.core.config import Config, TrainConfig
from cllm.core.errors import UsageError
from cllm.core.torchrun import Launch
from cllm.training.parallel.shards import deal_evenly


def check_launch(config: Config) -> None:
    """Raise ``UsageError`` where one process is asked for what needs torchrun."""
    if config.train.pipeline.mode == "stages":
        raise UsageError(
            "train.pipeline.mode = 'stages' needs processes: torchrun --nproc-per-node N -m cllm train …; "
            "one process goes on with --set train.pipeline.mode=off"
        )


def check_team(config: Config, launch: Launch) -> None:
    """Raise ``UsageError`` for what the processes of ``launch`` cannot do together."""
    train = config.train
    if train.parallel.workers not in ("auto", 1):
        raise UsageError(
            f"train.parallel.workers = {train.parallel.workers}: the processes of torchrun are the "
            "workers; leave it out"
        )
    if train.pipeline.mode == "delayed":
        raise UsageError(
            "train.pipeline.mode = 'delayed' is for one process, and torchrun made several; "
            "set it to off or to stages"
        )
    if ":" in train.device:
        kind = train.device.partition(":")[0]
        raise UsageError(
            f"train.device = {train.device!r}: each process of torchrun takes its own; say {kind}"
        )
    for setting, why in config.against_sharing():
        raise UsageError(f"several processes of torchrun: {setting} {why}")
    if train.dtype == "fp16" and runs_eagerly(train):
        raise UsageError("train.dtype = 'fp16' is for one process and ddp: use bf16 or fp32")
    if train.pipeline.mode == "stages":
        _check_stages(config, launch.size)
        return
    try:
        deal_evenly(train.batch_size, train.accumulate, launch.size)
    except ValueError as error:
        raise UsageError(str(error)) from error


def runs_eagerly(train: TrainConfig) -> bool:
    """Whether torch's own modules run, with their hooks, rather than the compiled step."""
    return train.parallel.strategy == "fsdp" or train.pipeline.mode == "stages"


def micro_batches_of(train: TrainConfig, processes: int) -> int:
    """Parts that a step's windows are cut into for the pipeline.

    ``auto``: twice as many as processes where they divide, else as many.

    Raises:
        ValueError: they do not divide, or there are fewer than stages.
    """
    windows, asked = train.batch_size * train.accumulate, train.pipeline.micro_batches
    wanted = [2 * processes, processes] if asked == "auto" else [asked]
    for count in wanted:
        if count >= processes and windows % count == 0 and count % processes == 0:
            return count
    if asked == "auto":
        raise ValueError(
            f"train.batch_size = {train.batch_size} (times train.accumulate = {train.accumulate}) does not "
            f"divide into micro-batches for {processes} stages: make it a multiple of {processes}"
        )
    raise ValueError(
        f"train.pipeline.micro_batches = {asked} must be a multiple of the {processes} processes and "
        f"divide the {windows} windows of a step (train.batch_size times train.accumulate)"
    )


def _check_stages(config: Config, processes: int) -> None:
    train, layers = config.train, config.model.n_layers
    each = train.pipeline.stages_of_each
    if processes < 2:
        raise UsageError("train.pipeline.mode = 'stages' needs two processes: --nproc-per-node 2")
    if processes * each > layers:
        raise UsageError(
            f"train.pipeline.schedule = {train.pipeline.schedule!r} with {processes} processes makes "
            f"{processes * each} stages, but model.n_layers = {layers}: start fewer processes"
            + (", or use 1f1b" if each > 1 else "")
        )
    if train.parallel.strategy == "fsdp":
        raise UsageError("train.pipeline.mode = 'stages' goes with train.parallel.strategy = 'ddp'")
    try:
        micro_batches_of(train, processes)
    except ValueError as error:
        raise UsageError(str(error)) from error
