"""``train.pipeline``: a step's work in a pipeline."""

from __future__ import annotations

from typing import Literal

from cllm.core.section import PositiveInt, Section


class PipelineConfig(Section):
    """Layers in stages, each in a process of its own."""

    mode: Literal["off", "stages"] = "off"
    """``stages`` cuts the layers up among the processes of torchrun."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv"] = "1f1b"
    """Who computes what when; the last three cut two stages for each process."""
    micro_batches: Literal["auto"] | PositiveInt = "auto"
    """Parts of a step's windows that pass through the stages one behind the other."""

    @property
    def stages_of_each(self) -> int:
        """Stages of one process."""
        return 1 if self.schedule in ("gpipe", "1f1b") else 2
