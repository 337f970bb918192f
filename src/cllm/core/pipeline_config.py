"""``train.pipeline``: a step's work in a pipeline; and what does not go with a delayed one, nor with an
update within the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from cllm.core.section import PositiveInt, Section

if TYPE_CHECKING:
    from cllm.core.config import Config


class PipelineConfig(Section):
    """Several batches in work at once, or layers in stages, each in a process of its own."""

    mode: Literal["off", "delayed", "stages"] = "off"
    """``delayed``: forward, backward and optimizer of three batches on three threads; gradients are of the
    weights of two steps ago (see ``docs/parallel.md``). ``stages`` cuts the layers up among the processes
    of torchrun."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv"] = "1f1b"
    """Of ``stages``: who computes what when; the last three cut two stages for each process."""
    micro_batches: Literal["auto"] | PositiveInt = "auto"
    """Of ``stages``: parts of a step's windows that pass through them one behind the other."""

    @property
    def stages_of_each(self) -> int:
        """Stages of one process."""
        return 1 if self.schedule in ("gpipe", "1f1b") else 2


def against_pipeline(config: Config) -> Iterator[tuple[str, str]]:
    """Settings that do not go with a delayed pipeline, and why."""
    train, embedding = config.train, config.model.embedding
    if train.device not in ("auto", "cpu"):
        yield f"train.device = {train.device!r}", "has a queue of its own; use 'cpu'"
    if train.dtype == "fp16":
        yield "train.dtype = 'fp16'", "scales each loss by what the step before did; use 'bf16'"
    if train.parallel.workers not in ("auto", 1):
        yield f"train.parallel.workers = {train.parallel.workers}", "divides steps up; set it to 1"
    if train.lazy_rows == "on":
        yield "train.lazy_rows = 'on'", "brings rows up to date as they are read; set it to off"
    if train.loss == "sampled":
        yield "train.loss = 'sampled'", "draws in step with the optimizer; use 'exact'"
    if train.similarity.weight:
        yield "train.similarity.weight", "draws in step with the optimizer; set it to 0"
    if config.model.norm == "batchnorm":
        yield (
            "model.norm = 'batchnorm'",
            "has averages that a skipped step puts back; use 'rmsnorm'",
        )
    for name in ("kind", "lattice"):
        value = getattr(embedding, name)
        if embedding.is_composed if name == "kind" else value != "none":
            why = "is computed once a step, and there is one copy of it; leave it out"
            yield f"model.embedding.{name} = {value!r}", why


def against_early_update(config: Config) -> Iterator[tuple[str, str]]:
    """Settings that do not go with the optimizer in the backward pass, and why."""
    train = config.train
    if train.clip:
        yield f"train.clip = {train.clip:g}", "needs the norm of the whole gradient; set it to 0"
    if train.accumulate > 1:
        yield f"train.accumulate = {train.accumulate}", "adds gradients up first; set it to 1"
    if train.dtype == "fp16":
        yield "train.dtype = 'fp16'", "skips steps that overflow; use 'bf16'"
    if train.compile == "on":
        yield "train.compile = 'on'", "has all gradients at once; use 'off'"
    if train.parallel.workers != 1:
        workers = train.parallel.workers
        yield f"train.parallel.workers = {workers!r}", "add gradients up first; set it to 1"
    if train.pipeline.mode != "off":
        yield f"train.pipeline.mode = {train.pipeline.mode!r}", "updates elsewhere; set it to 'off'"
    if train.lazy_rows == "on":
        yield "train.lazy_rows = 'on'", "updates rows at the end; set it to off"
    if train.loss == "sampled":
        yield "train.loss = 'sampled'", "has gradients of rows; use 'exact'"
    if train.similarity.weight:
        yield "train.similarity.weight", "adds to gradients at the end; set it to 0"
