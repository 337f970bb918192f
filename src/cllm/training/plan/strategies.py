"""Strategies side by side: memory of a device, time of a step, and bytes that are sent.

Replicas sum their gradients. Sharded training (ZeRO 3, Rajbhandari et al. 2020) gathers the weights of each
layer for forward and again for backward, what belongs to no layer once (``fully_shard`` keeps it in
between), and scatters gradients. Seconds and bytes of these are ``Network``'s. Nothing is taken to hide
behind arithmetic: where it does, a step is shorter.
"""

from __future__ import annotations

from cllm.core.config import Config
from cllm.training.parallel.shards import deal
from cllm.training.plan.calibrate import Constants
from cllm.training.plan.estimate import (
    Estimate,
    Memory,
    activation_bytes,
    added_seconds,
    checked,
    compute_seconds,
    share_of,
    tokens_of,
    whole_memory,
)
from cllm.training.plan.machines import Devices
from cllm.training.plan.network import Network
from cllm.training.plan.roofline import Rates
from cllm.training.plan.work import MASTER, Work, with_rows, work_of

HAND_OVERS = 3
"""Orders to each worker in a step: to compute, to add up, to update."""


def one_process(config: Config, constants: Constants, room: float | None) -> Estimate:
    """One process on this machine. ``room``: bytes of memory that it may use."""
    work = work_of(config, constants.rates)
    threads = config.train.threads
    return checked(
        Estimate(
            strategy=f"one process, {threads} thread{'s' * (threads != 1)}",
            kind="process",
            devices=1,
            memory=whole_memory(work, constants.base_memory),
            compute=compute_seconds(work, config.train.accumulate, constants.rates.bandwidth),
            tokens=tokens_of(config),
            micro_batch=config.train.batch_size,
        ),
        room,
    )


def workers(config: Config, constants: Constants, room: float | None) -> Estimate:
    """``train.parallel.workers`` processes over one copy of the weights on this machine.

    ``constants`` are one process's beside the others, each of which adds up and updates a stretch of the
    arena. Raises ``ValueError`` where the windows do not divide.
    """
    train, rates = config.train, constants.rates
    count = train.parallel.workers
    assert isinstance(count, int)
    share = deal(train.batch_size, train.accumulate, count)[-1]  # the last has the most
    mine = with_rows(config, share[0].last - share[0].first)
    work = work_of(mine, rates)
    arena = MASTER * work.arena.of(work.layers)
    micros = len(share) * (work.micro.of(work.layers) + added_seconds(arena, rates.bandwidth))
    summed = (count - 1) * added_seconds(arena / count, rates.bandwidth)
    memory = whole_memory(work, constants.base_memory)
    activations = activation_bytes(work, whole=False)
    return checked(
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
            compute=micros + work.end.of(work.layers) / count,
            communication=summed + HAND_OVERS * (count - 1) * constants.hand_over,
            sent=arena,
            tokens=tokens_of(config),
            micro_batch=work.config.train.batch_size,
        ),
        room,
    )


def first_worker_bytes(config: Config, constants: Constants) -> float:
    """Bytes of the first of the workers: what its peak memory shows. Of the others' gradients and of the
    moments it touches the stretch that it adds up and updates."""
    count = config.train.parallel.workers
    assert isinstance(count, int)
    share = deal(config.train.batch_size, config.train.accumulate, count)[0]
    work = work_of(with_rows(config, share[0].last - share[0].first), constants.rates)
    arena = MASTER * work.arena.of(work.layers)
    memory = whole_memory(work, constants.base_memory)
    held = memory.weights + (2 - 1 / count) * arena + memory.optimizer / count
    return held + activation_bytes(work, whole=False) + memory.base


def replicated(config: Config, devices: Devices) -> Estimate:
    """Data parallel (DDP): each device has the whole model and a share of the windows."""
    found = share_of(config, devices.count)
    if isinstance(found, str):
        return Estimate(strategy="DDP", kind="ddp", devices=devices.count, obstacle=found)
    rows, count = found
    work = work_of(with_rows(config, rows), devices.rates)
    gradient, network = MASTER * work.arena.of(work.layers), devices.network
    ordered, ordering = network.order(tokens_of(config) / devices.count, numbers=1)
    name = "one device" if devices.count == 1 else "DDP"
    return checked(
        Estimate(
            strategy=name,
            kind="process" if devices.count == 1 else "ddp",
            devices=devices.count,
            memory=whole_memory(work, devices.base),
            compute=compute_seconds(work, count, devices.rates.bandwidth),
            communication=network.all_reduce(gradient) + ordering,
            sent=network.summed(gradient) + ordered,
            tokens=tokens_of(config),
            micro_batch=rows,
        ),
        devices.memory,
    )


def sharded(config: Config, devices: Devices) -> Estimate:
    """Fully sharded (FSDP): weights, gradients and moments are cut in N, and weights gathered layer by
    layer for each forward and backward."""
    found = share_of(config, devices.count)
    if isinstance(found, str):
        return Estimate(strategy="FSDP", kind="fsdp", devices=devices.count, obstacle=found)
    rows, count = found
    number, network = devices.count, devices.network
    work = work_of(with_rows(config, rows), devices.rates)
    sent, sending = _shards_of_a_micro_batch(work, network)
    ordered, ordering = network.order(tokens_of(config) / number, numbers=2)
    unit = max(work.parameters.layer, work.parameters.fixed)
    whole = whole_memory(work, 0.0)
    activations = work.activations.of(work.layers) - MASTER * work.arena.of(work.layers)
    end = work.end.of(work.layers) / number
    # The first process has the whole model in main memory besides.
    home = whole.weights + whole.optimizer if devices.is_host else 0.0
    return checked(
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
                base=devices.base + home,
            ),
            compute=count * (work.micro.of(work.layers) + _copying(work, devices.rates)) + end,
            communication=count * sending + ordering,
            sent=count * sent + ordered,
            tokens=tokens_of(config),
            micro_batch=rows,
        ),
        devices.memory,
    )


def _copying(work: Work, rates: Rates) -> float:
    """Seconds of a micro-batch in which weights are copied out of the buffers that they were gathered in,
    and gradients into those that they are scattered from."""
    layer, rest = work.parameters.layer, work.parameters.fixed
    seconds = 0.0
    for numbers, gathers, times in ((layer, 2, work.layers), (rest, 1, 1)):
        for size in (*[numbers * work.compute_width] * gathers, MASTER * numbers):
            seconds += times * 2 * size / rates.bandwidth(2 * size)
    return seconds


def _shards_of_a_micro_batch(work: Work, network: Network) -> tuple[float, float]:
    """(bytes, seconds) to gather weights and scatter gradients, layer by layer."""
    sent = seconds = 0.0
    layer, rest = work.parameters.layer, work.parameters.fixed
    for numbers, gathers, times in ((layer, 2, work.layers), (rest, 1, 1)):
        weights, gradient = numbers * work.compute_width, MASTER * numbers
        sent += times * (gathers * network.gathered(weights) + network.scattered(gradient))
        seconds += times * gathers * network.all_gather(weights)
        seconds += times * network.reduce_scatter(gradient)
    return sent, seconds
