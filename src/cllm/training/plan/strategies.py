"""Strategies side by side: memory of a device, time of a step, and bytes that are sent.

Communication is the α–β model (Hockney 1994): a message of n bytes takes latency + n / bandwidth. Rings of
N devices (Patarasuk & Yuan 2009) send 2(N−1)/N of a gradient to sum it everywhere, and half of that to
scatter or to gather it. Sharded training (ZeRO 3, Rajbhandari et al. 2020) gathers the weights for forward
and for backward, and scatters gradients. A pipeline of S stages over M micro-batches waits for (S−1)/M of
its work (GPipe, Huang et al. 2019); stages hold at most S micro-batches at once (1F1B, PipeDream 2019).
Nothing is taken to hide behind arithmetic: where it does, a step is shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cllm.core.config import Config
from cllm.training.parallel.shards import deal
from cllm.training.plan.calibrate import Constants
from cllm.training.plan.machines import Devices
from cllm.training.plan.work import MASTER, Work, with_rows, work_of

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
    stages. ``sent``: bytes that a device sends in a step. ``obstacle``: why it cannot be, if it cannot."""

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

    @property
    def seconds(self) -> float:
        """A step."""
        return self.compute + self.communication + self.waiting

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second; 0 where it cannot be."""
        return self.tokens / self.seconds if self.seconds and not self.obstacle else 0.0


def one_process(config: Config, constants: Constants, room: float | None) -> Estimate:
    """One process on this machine. ``room``: bytes of memory that it may use."""
    work = work_of(config, constants.rates)
    threads = config.train.threads
    return _checked(
        Estimate(
            strategy=f"one process, {threads} thread{'s' * (threads != 1)}",
            kind="process",
            devices=1,
            memory=_whole(work, constants.base_memory),
            compute=_compute(work, config.train.accumulate, constants.rates.bandwidth),
            tokens=_tokens(config),
            micro_batch=config.train.batch_size,
        ),
        room,
    )


def workers(config: Config, constants: Constants, room: float | None) -> Estimate:
    """``train.parallel.workers`` processes over one copy of the weights on this machine.

    ``constants`` are one process's beside the others, who wait while one of them adds the gradients up
    and makes the optimizer's step. Raises ``ValueError`` where the windows do not divide.
    """
    train, rates, alone = config.train, constants.rates, constants.alone
    count = train.parallel.workers
    assert isinstance(count, int)
    share = deal(train.batch_size, train.accumulate, count)[-1]  # the last has the most
    mine = with_rows(config, share[0].last - share[0].first)
    work, end = work_of(mine, rates), work_of(mine, alone).end
    arena = MASTER * work.arena.of(work.layers)
    micros = len(share) * (work.micro.of(work.layers) + _added(arena, rates.bandwidth))
    summed = (count - 1) * _added(arena, alone.bandwidth)
    memory = _whole(work, constants.base_memory)
    activations = _activations(work, whole=False)
    return _checked(
        Estimate(
            strategy=f"{count} workers",
            kind="workers",
            devices=1,
            memory=Memory(
                weights=memory.weights,
                gradients=count * arena,
                optimizer=memory.optimizer,
                activations=activations + (count - 1) * (arena + work.activations.of(work.layers)),
                logits=count * memory.logits,
                base=count * memory.base,
            ),
            compute=micros + end.of(work.layers),
            communication=summed + (count - 1) * constants.hand_over,
            sent=arena,
            tokens=_tokens(config),
            micro_batch=work.config.train.batch_size,
        ),
        room,
    )


def first_worker_bytes(config: Config, constants: Constants) -> float:
    """Bytes of the first of the workers: what its peak memory shows."""
    count = config.train.parallel.workers
    assert isinstance(count, int)
    share = deal(config.train.batch_size, config.train.accumulate, count)[0]
    work = work_of(with_rows(config, share[0].last - share[0].first), constants.rates)
    arena = MASTER * work.arena.of(work.layers)
    memory = _whole(work, constants.base_memory)
    held = memory.weights + count * arena + memory.optimizer
    return held + _activations(work, whole=False) + memory.base


def replicated(config: Config, devices: Devices) -> Estimate:
    """Data parallel (DDP): each device has the whole model and a share of the windows."""
    found = _share(config, devices.count)
    if isinstance(found, str):
        return Estimate(strategy="DDP", kind="ddp", devices=devices.count, obstacle=found)
    rows, count = found
    work = work_of(with_rows(config, rows), devices.rates)
    gradient = MASTER * work.parameters.of(work.layers)
    sent = 2 * (devices.count - 1) / devices.count * gradient
    name = "one device" if devices.count == 1 else "DDP"
    return _checked(
        Estimate(
            strategy=name,
            kind="process" if devices.count == 1 else "ddp",
            devices=devices.count,
            memory=_whole(work, 0.0),
            compute=_compute(work, count, devices.rates.bandwidth),
            communication=sent / devices.link + 2 * (devices.count - 1) * devices.latency,
            sent=sent,
            tokens=_tokens(config),
            micro_batch=rows,
        ),
        devices.memory,
    )


def sharded(config: Config, devices: Devices) -> Estimate:
    """Fully sharded (FSDP): weights, gradients and moments are cut in N, and weights gathered layer by
    layer for each forward and backward."""
    found = _share(config, devices.count)
    if isinstance(found, str):
        return Estimate(strategy="FSDP", kind="fsdp", devices=devices.count, obstacle=found)
    rows, count = found
    number = devices.count
    work = work_of(with_rows(config, rows), devices.rates)
    numbers, ring = work.parameters.of(work.layers), (number - 1) / number
    gathered = 2 * numbers * work.compute_width
    sent = count * ring * (gathered + MASTER * numbers)
    messages = count * 3 * (work.layers + 1) * (number - 1)
    unit = max(work.parameters.layer, work.parameters.fixed)
    whole = _whole(work, 0.0)
    activations = work.activations.of(work.layers) - MASTER * work.arena.of(work.layers)
    end = work.end.of(work.layers) / number
    return _checked(
        Estimate(
            strategy="FSDP",
            kind="fsdp",
            devices=number,
            memory=Memory(
                weights=whole.weights / number + 2 * unit * work.compute_width,
                gradients=whole.gradients / number + unit * MASTER,
                optimizer=whole.optimizer / number,
                activations=activations,
                logits=whole.logits,
            ),
            compute=count * work.micro.of(work.layers) + end,
            communication=sent / devices.link + messages * devices.latency,
            sent=sent,
            tokens=_tokens(config),
            micro_batch=rows,
        ),
        devices.memory,
    )


def pipelined(config: Config, devices: Devices) -> Estimate:
    """The best pipeline: stages of whole layers, each on a device, and replicas of it side by side."""
    options = list(_pipelines(config, devices))
    fitting = [option for option in options if not option.obstacle]
    if fitting:
        return max(fitting, key=lambda option: option.tokens_per_second)
    if options:
        return min(options, key=lambda option: option.memory.total)
    why = f"{config.model.n_layers} layers and {_windows(config):,} windows give no equal stages"
    return Estimate(strategy="pipeline", kind="pipeline", devices=devices.count, obstacle=why)


def _pipelines(config: Config, devices: Devices) -> Iterator[Estimate]:
    layers, windows = config.model.n_layers, _windows(config)
    for stages in range(2, min(layers, devices.count) + 1):
        replicas, rest = divmod(devices.count, stages)
        if rest or windows % replicas:
            continue
        rows = config.train.batch_size
        while rows >= 1:
            if (windows // replicas) % rows == 0:
                yield _pipeline(config, devices, stages, replicas, rows)
            rows //= 2


def _pipeline(config: Config, devices: Devices, stages: int, replicas: int, rows: int) -> Estimate:
    work = work_of(with_rows(config, rows), devices.rates)
    micros = _windows(config) // replicas // rows
    deep = -(-work.layers // stages)  # layers of the longest stage
    # Table and head lie at the two ends; the last stage has what does not belong to a layer.
    slowest = max(
        deep * work.micro.layer, work.layers // stages * work.micro.layer + work.micro.fixed
    )
    numbers = deep * work.parameters.layer + work.parameters.fixed
    arena = deep * work.arena.layer + work.arena.fixed
    messages = 2 * micros * (devices.latency + work.boundary / devices.link)
    gradient = MASTER * numbers
    ring = 2 * (replicas - 1) / replicas * gradient
    saved = work.activations.saved.layer
    in_flight = min(stages, micros)
    activations = max(
        in_flight * deep * saved,
        deep * saved + work.activations.saved.fixed,
    )
    end = deep * work.end.layer + work.end.fixed
    label = f"pipeline of {stages}" + (f" × DDP {replicas}" if replicas > 1 else "")
    return _checked(
        Estimate(
            strategy=label,
            kind="pipeline",
            devices=devices.count,
            memory=Memory(
                weights=arena * work.weight_bytes,
                gradients=2 * MASTER * arena,
                optimizer=arena * work.optimizer_bytes,
                activations=activations,
                logits=work.logits,
            ),
            compute=micros * slowest + end,
            communication=messages + ring / devices.link + 2 * (replicas - 1) * devices.latency,
            waiting=(stages - 1) * slowest,
            sent=2 * micros * work.boundary + ring,
            tokens=_tokens(config),
            micro_batch=rows,
        ),
        devices.memory,
    )


def _share(config: Config, count: int) -> tuple[int, int] | str:
    """Windows of a device's micro-batch, and its micro-batches a step; or why there are none."""
    windows = _windows(config)
    if windows % count:
        return (
            f"the {windows:,} windows of a step (train.batch_size × train.accumulate) do not divide among "
            f"{count:,} devices"
        )
    mine = windows // count
    rows = math.gcd(mine, config.train.batch_size)
    return rows, mine // rows


def _windows(config: Config) -> int:
    return config.train.batch_size * config.train.accumulate


def _tokens(config: Config) -> int:
    return _windows(config) * config.model.context


def _compute(work: Work, micros: int, bandwidth: Bandwidth) -> float:
    """Seconds of a step on one device: its micro-batches, which are added up where there are several,
    and the end."""
    layers = work.layers
    seconds = work.micro.of(layers)
    if micros > 1:
        seconds += _added(MASTER * work.arena.of(layers), bandwidth)
    return micros * seconds + work.end.of(layers)


def _added(size: float, bandwidth: Bandwidth) -> float:
    """Seconds to add ``size`` bytes of gradient to others."""
    return 3 * size / bandwidth(3 * size)


def _whole(work: Work, base: float) -> Memory:
    """Memory of one that holds the whole model. A micro-batch's gradient is counted with the summed one."""
    arena = work.arena.of(work.layers)
    return Memory(
        weights=arena * work.weight_bytes,
        gradients=2 * MASTER * arena,
        optimizer=arena * work.optimizer_bytes,
        activations=_activations(work, whole=True),
        logits=work.logits,
        base=base,
    )


def _activations(work: Work, whole: bool) -> float:
    """Bytes at their most beside weights, gradients and moments; ``whole``: without the gradient that a
    micro-batch makes, which is counted apart."""
    gradient = MASTER * work.arena.of(work.layers)
    peak = max(work.activations.of(work.layers), gradient + work.temporary.of(work.layers))
    return peak - gradient if whole else peak


def _checked(estimate: Estimate, room: float | None) -> Estimate:
    if estimate.obstacle or room is None or estimate.memory.total <= room:
        return estimate
    need, memory = estimate.memory.total, estimate.memory
    why = f"does not fit: {need / 1e9:,.1f} GB of {room / 1e9:,.1f}"
    if memory.activations > need / 2 and estimate.micro_batch > 1:
        why += "; halve train.batch_size and double train.accumulate"
    return replace(estimate, obstacle=why)
