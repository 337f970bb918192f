"""The trainer's state to and from a checkpoint, keyed by parameter name.

Any arrangement of the weights in memory loads any checkpoint; what cannot be resumed to the same bits
(another thread count, precision or torch version) is named.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cllm.core.config import TrainConfig
from cllm.core.errors import UserError
from cllm.core.torchrun import launched
from cllm.model.transformer import Transformer
from cllm.store.checkpoint import Checkpoint
from cllm.training.lazy_rows import restore_idle
from cllm.training.step import TrainStep


@dataclass
class Standing:
    """How far training has come, beside weights and optimizer."""

    step: int = 0
    tokens: int = 0
    """Target tokens trained on."""
    best_bpb: float = float("inf")
    best_step: int = -1
    patience_bpb: float = float("inf")
    """The figure that the next validation must undercut by ``min_improvement``."""
    stale: int = 0
    """Validations in a row that did not."""
    rising: int = 0
    """Validations in a row that rose while the training loss stayed below them."""
    last_bpb: float = float("inf")
    train_loss: float = float("inf")
    """The last logged mean training loss."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps since then, so that a resumed run logs the same means."""
    train_seconds: float = 0.0
    unvalidated: bool = False
    """Whether the validation that is due at ``step`` is still to be made: a signal ended it."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values; infinities as ``None``."""
        return {k: None if v == float("inf") else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Standing:
        """The inverse of ``to_json``."""
        standing = cls()
        for name, value in values.items():
            setattr(standing, name, float("inf") if value is None else value)
        return standing


EARLIER = {"workers": 1, "processes": "1", "pipeline": "off"}
"""What checkpoints were made with that do not say."""


def environment(config: TrainConfig) -> dict[str, Any]:
    """What the bits of a training step depend on beside configuration and data."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "workers": config.parallel.workers,
        "processes": _processes(config),
        "pipeline": "delayed" if config.pipeline.mode == "delayed" else "off",
        "dtype": config.dtype,
        "device": config.device,
        "compile": config.compile,
        "attention": config.attention,
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def _processes(config: TrainConfig) -> str:
    launch = launched()
    if launch is None:
        return "1"
    how: str = config.parallel.strategy
    if config.pipeline.mode == "stages":
        how = f"{config.pipeline.schedule} stages"
    return f"{launch.size} by {how}"


def weights_of(model: Transformer) -> dict[str, torch.Tensor]:
    """Named weights and buffers to save, each once; to be called and saved within ``step.settled()``."""
    return dict(model.state_dict())


def optimizer_of(step: TrainStep, *, moments: bool = True) -> dict[str, Any]:
    """Optimizer state by moment and parameter name, the step's counters, and what idle rows have missed.

    ``moments``: False to leave the moments out, which others write. To be called outside
    ``step.settled()``.
    """
    found: dict[str, Any] = {}
    if moments:
        if step.team is not None:
            step.team.gather()
        found["moments"] = step.arena.named_moments()
    found["counters"] = dict(step.counters)
    return found if step.lazy is None else found | {"idle": step.lazy.state()}


def restore(checkpoint: Checkpoint, model: Transformer, step: TrainStep) -> Standing:
    """Put a checkpoint's weights, optimizer and counters in place; returns where it stood.

    Raises ``UserError`` if it belongs to another model or optimizer.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in checkpoint.weights.items()}
    moments = checkpoint.optimizer.get("moments", {})
    if wanted != found or set(moments) != set(step.arena.moments):
        raise UserError(
            f"{checkpoint.path} belongs to another model or optimizer than run.toml says: one was "
            "altered; bring back what it was"
        )
    step.arena.load(checkpoint.weights, moments)
    buffers = dict(model.named_buffers())
    for name, tensor in checkpoint.weights.items():
        if name in buffers:
            buffers[name].copy_(tensor)
    scaled = checkpoint.state["environment"]["dtype"] == "fp16"
    for name, value in checkpoint.optimizer["counters"].items():
        # A run that changes to or from fp16 on resume begins with the loss scale of its own.
        if scaled == step.scaling or name not in ("loss_scale", "calm"):
            step.counters[name].copy_(value)
    step.refresh()
    if "idle" in checkpoint.optimizer:
        restore_idle(step.arena, step.optimizer, step.lazy, checkpoint.optimizer["idle"])
    return Standing.from_json(checkpoint.state["standing"])


def differences(checkpoint: Checkpoint, config: TrainConfig) -> list[str]:
    """What differs from the environment that the checkpoint was made in, in words."""
    before, now = checkpoint.state["environment"], environment(config)
    return [
        f"{name} {before.get(name)} then, {value} now"
        for name, value in now.items()
        if before.get(name, EARLIER.get(name)) != value
    ]
