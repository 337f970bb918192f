"""What a strategy is foretold to take, and what all strategies count alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cllm.core.config import Config
from cllm.training.parallel.shards import deal_evenly
from cllm.training.plan.work import MASTER, Work

Bandwidth = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device. ``logits`` are part of ``activations``; ``base``: the program itself."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    base: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.base


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A strategy's forecast. Seconds of a step: ``compute``, ``communication``, ``waiting`` for other
    stages. ``sent``: bytes that a device sends in a step. ``replicas`` of a pipeline side by side.
    ``obstacle``: why it cannot be, if it cannot."""

    strategy: str
    kind: str
    devices: int
    memory: Memory = Memory()
    compute: float = 0.0
    communication: float = 0.0
    waiting: float = 0.0
    sent: float = 0.0
    tokens: int = 0
    obstacle: str = ""
    micro_batch: int = 0
    replicas: int = 1

    @property
    def seconds(self) -> float:
        """A step."""
        return self.compute + self.communication + self.waiting

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second; 0 where it cannot be."""
        return self.tokens / self.seconds if self.seconds and not self.obstacle else 0.0


def share_of(config: Config, count: int) -> tuple[int, int] | str:
    """Windows of a device's micro-batch, and its micro-batches a step; or why there are none."""
    train = config.train
    try:
        shards = deal_evenly(train.batch_size, train.accumulate, count)[0]
    except ValueError:
        return (
            f"the {windows_of(config):,} windows of a step (train.batch_size × train.accumulate) do not "
            f"divide among {count:,} devices"
        )
    return shards[0].last - shards[0].first, len(shards)


def windows_of(config: Config) -> int:
    """Windows of a step."""
    return config.train.batch_size * config.train.accumulate


def tokens_of(config: Config) -> int:
    """Tokens of a step."""
    return windows_of(config) * config.model.context


def compute_seconds(work: Work, micros: int, bandwidth: Bandwidth) -> float:
    """Seconds of a step on one device: its micro-batches, which are added up where there are several,
    and the end."""
    layers = work.layers
    seconds = work.micro.of(layers)
    if micros > 1:
        seconds += added_seconds(MASTER * work.arena.of(layers), bandwidth)
    return micros * seconds + work.end.of(layers)


def added_seconds(size: float, bandwidth: Bandwidth) -> float:
    """Seconds to add ``size`` bytes of gradient to others."""
    return 3 * size / bandwidth(3 * size)


def whole_memory(work: Work, base: float) -> Memory:
    """Memory of one that holds the whole model. A micro-batch's gradient is counted with the summed one."""
    arena = work.arena.of(work.layers)
    return Memory(
        weights=arena * work.weight_bytes,
        gradients=2 * MASTER * arena,
        optimizer=arena * work.optimizer_bytes,
        activations=activation_bytes(work, whole=True),
        logits=work.logits,
        base=base,
    )


def activation_bytes(work: Work, whole: bool) -> float:
    """Bytes at their most beside weights, gradients and moments; ``whole``: without the gradient that a
    micro-batch makes, which is counted apart."""
    gradient = MASTER * work.arena.of(work.layers)
    peak = max(work.activations.of(work.layers), gradient + work.temporary.of(work.layers))
    return peak - gradient if whole else peak


def checked(estimate: Estimate, room: float | None) -> Estimate:
    """``estimate`` with an obstacle where it does not fit into ``room`` bytes of a device."""
    if estimate.obstacle or room is None or estimate.memory.total <= room:
        return estimate
    need, memory = estimate.memory.total, estimate.memory
    why = f"does not fit: {need / 1e9:,.1f} GB of {room / 1e9:,.1f}"
    if memory.activations > need / 2 and estimate.micro_batch > 1:
        why += "; halve train.batch_size and double train.accumulate"
    return replace(estimate, obstacle=why)
