"""Pipelines: stages of whole layers, each on a device, and replicas of them side by side.

A pipeline of S stages over M micro-batches waits for (S−1)/M of its work (GPipe, Huang et al. 2019); stages
hold at most S micro-batches at once (1F1B, PipeDream 2019).
"""

from __future__ import annotations

from collections.abc import Iterator

from cllm.core.config import Config
from cllm.training.plan.estimate import Estimate, Memory, checked, tokens_of, windows_of
from cllm.training.plan.machines import Devices
from cllm.training.plan.work import MASTER, with_rows, work_of


def pipelined(config: Config, devices: Devices) -> Estimate:
    """The best pipeline: stages of whole layers, each on a device, and replicas of it side by side."""
    options = list(_pipelines(config, devices))
    fitting = [option for option in options if not option.obstacle]
    if fitting:
        return max(fitting, key=lambda option: option.tokens_per_second)
    if options:
        return min(options, key=lambda option: option.memory.total)
    why = f"{config.model.n_layers} layers and {windows_of(config):,} windows give no equal stages"
    return Estimate(strategy="pipeline", kind="pipeline", devices=devices.count, obstacle=why)


def staged(config: Config, devices: Devices, rows: int) -> Estimate:
    """A pipeline of one stage on each device, with micro-batches of ``rows`` windows."""
    return _pipeline(config, devices, devices.count, 1, rows)


def _pipelines(config: Config, devices: Devices) -> Iterator[Estimate]:
    layers, windows = config.model.n_layers, windows_of(config)
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
    micros = windows_of(config) // replicas // rows
    deep = -(-work.layers // stages)  # layers of the longest stage
    # Table and head lie at the two ends; the last stage has what does not belong to a layer.
    slowest = max(
        deep * work.micro.layer, work.layers // stages * work.micro.layer + work.micro.fixed
    )
    numbers = deep * work.parameters.layer + work.parameters.fixed
    arena = deep * work.arena.layer + work.arena.fixed
    network, gradient = devices.network, MASTER * numbers
    # A stage between two others sends forth and back.
    sent = (1 if stages == 2 else 2) * micros * work.boundary + network.summed(gradient, replicas)
    sending = 2 * micros * network.exchange(work.boundary) + network.all_reduce(gradient, replicas)
    if config.model.tie_embeddings:
        table = MASTER * work.parameters.fixed  # in the first stage and in the last
        sent += network.summed(table, 2)
        sending += network.all_reduce(table, 2)
    ordered, ordering = network.order(tokens_of(config) / replicas, numbers=2)
    saved = work.activations.saved.layer
    in_flight = min(stages, micros)
    activations = max(
        in_flight * deep * saved,
        deep * saved + work.activations.saved.fixed,
    )
    end = deep * work.end.layer + work.end.fixed
    label = f"pipeline of {stages}" + (f" × DDP {replicas}" if replicas > 1 else "")
    return checked(
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
                base=devices.base,
            ),
            compute=micros * slowest + end,
            communication=sending + ordering,
            waiting=(stages - 1) * slowest,
            sent=sent + ordered,
            tokens=tokens_of(config),
            micro_batch=rows,
            replicas=replicas,
        ),
        devices.memory,
    )
