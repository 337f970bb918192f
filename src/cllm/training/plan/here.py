"""A plan for this machine, whose constants are measured if they are not known."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from cllm.core.config import Config
from cllm.core.cpu import is_busy
from cllm.core.errors import UsageError
from cllm.core.machine import machine
from cllm.core.measurements import recall, remember
from cllm.core.memory import available_memory
from cllm.core.torchrun import Launch
from cllm.training.choose import choose, compile_seconds
from cllm.training.distributed.check import check_team, micro_batches_of
from cllm.training.parallel.shards import deal
from cllm.training.plan.ask import ask
from cllm.training.plan.calibrate import Constants, constants
from cllm.training.plan.estimate import Estimate, share_of, windows_of
from cllm.training.plan.forecast import Plan, parameters_of, refuse
from cllm.training.plan.machines import Devices
from cllm.training.plan.network import Network
from cllm.training.plan.pipelines import staged
from cllm.training.plan.strategies import one_process, replicated, sharded, workers
from cllm.training.plan.work import products_of, with_rows

Say = Callable[[str], None]
LINK = "cllm.training.plan.link_probe"


def plan_here(config: Config, tokens: int | None, say: Say) -> Plan:
    """One process, workers, and processes of torchrun on this machine."""
    refuse(config)
    cores, room = machine().threads, available_memory()
    estimates = []
    resolved = config
    for threads in dict.fromkeys((1, cores)):
        resolved = _here(config, threads, 1)
        estimates.append(one_process(resolved, constants_of(resolved, say), room))
    notes = []
    for count in _worker_counts(config, cores):
        try:
            some = _here(config, 1, count)
        except UsageError as error:
            estimates.append(
                Estimate(
                    strategy=f"{count} workers", kind="workers", devices=1, obstacle=str(error)
                )
            )
            continue
        estimates.append(workers(some, constants_of(some, say), room))
    if resolved.train.device != "cpu":
        raise UsageError(
            f"train.device = {resolved.train.device!r}: only this machine's CPU is measured; describe the "
            "device in a list (--machines), or set train.device=cpu"
        )
    if cores > 1:
        estimates += _by_torchrun(_here(config, 1, 1), cores, say)
    chosen = resolved.train
    notes.append(
        f"arithmetic {chosen.dtype}, attention {chosen.attention}, "
        f"{'compiled' if chosen.compile == 'on' else 'eager'} code"
    )
    return Plan(
        config=resolved,
        where=f"this machine: {machine().cpu}, {cores} threads",
        estimates=estimates,
        tokens=tokens,
        parameters=parameters_of(resolved),
        compiling=compile_seconds(resolved) if chosen.compile == "on" else 0.0,
        notes=notes,
    )


def _by_torchrun(config: Config, count: int, say: Say) -> Iterator[Estimate]:
    """DDP, FSDP and stages by ``count`` processes of one thread; the last two run uncompiled."""
    launch = Launch(rank=0, size=count, local_rank=0, local_size=count, job="")
    eager = {"train.compile": "off"}
    for name, kind, changes in (
        ("DDP", "ddp", {}),
        ("FSDP", "fsdp", eager | {"train.parallel.strategy": "fsdp"}),
        (f"pipeline of {count}", "pipeline", eager | {"train.pipeline.mode": "stages"}),
    ):
        some = config.replace(**changes)
        try:
            check_team(some, launch)
        except UsageError as error:
            yield Estimate(strategy=name, kind=kind, devices=count, obstacle=str(error))
            continue
        yield by_processes(some, count, say)


def by_processes(config: Config, count: int, say: Say) -> Estimate:
    """The strategy of ``config`` (resolved) by ``count`` processes of torchrun on this machine."""
    if config.train.pipeline.mode == "stages":
        rows = windows_of(config) // micro_batches_of(config.train, count)
        return staged(config, devices_here(config, count, rows, say), rows)
    share = share_of(config, count)
    assert not isinstance(share, str)
    devices = devices_here(config, count, share[0], say)
    return (sharded if config.train.parallel.strategy == "fsdp" else replicated)(config, devices)


def constants_of(config: Config, say: Say) -> Constants:
    """This machine's constants for the shapes of one process of ``config`` (resolved) among its workers."""
    train = config.train
    assert isinstance(train.threads, int)
    assert isinstance(train.parallel.workers, int)
    shares = deal(train.batch_size, train.accumulate, train.parallel.workers)
    rows = shares[-1][0].last - shares[-1][0].first
    return constants(
        products_of(with_rows(config, rows)),
        threads=train.threads,
        dtype=train.dtype,
        compiled=train.compile == "on",
        together=train.parallel.workers,
        say=say,
    )


def devices_here(config: Config, count: int, rows: int, say: Say) -> Devices:
    """``count`` processes of this machine as the devices of torchrun, which share its memory; rates are of
    micro-batches of ``rows`` windows."""
    train, room = config.train, available_memory()
    assert isinstance(train.threads, int)
    known = constants(
        products_of(with_rows(config, rows)),
        threads=train.threads,
        dtype=train.dtype,
        compiled=train.compile == "on",
        together=count,
        say=say,
    )
    return Devices(
        name=machine().cpu,
        rates=known.rates,
        memory=room / count if room is not None else None,
        network=network_of(count, say),
        base=known.base_memory,
        is_host=True,
    )


def network_of(count: int, say: Say) -> Network:
    """What ``count`` processes of this machine send each other over gloo; measured once, and not kept from
    a busy machine."""
    name = f"plan 4 gloo by {count}"
    known: dict[str, Any] | None = recall(name, threads=1)
    if known is not None:
        return Network.of_gloo(count, known)
    say(f"measuring this machine once: what {count} processes send each other")
    busy = is_busy(count)
    with tempfile.TemporaryDirectory(prefix="cllm-plan-") as folder:
        request = {"threads": 1, "processes": count, "store": os.path.join(folder, "store")}
        found = ask(request, count, program=LINK)[0]  # all say the same
    remember(name, found, threads=1, for_good=not busy)
    return Network.of_gloo(count, found)


def _worker_counts(config: Config, cores: int) -> list[int]:
    """Twos, up to the cores; and what was asked for."""
    asked = config.train.parallel.workers
    counts = {2**e for e in range(1, cores.bit_length()) if 2**e <= cores} | {cores}
    if isinstance(asked, int):
        counts.add(asked)
    return sorted(counts - {1})


def _here(config: Config, threads: int, count: int) -> Config:
    """``config`` as ``cllm train`` would resolve it with these threads and workers."""
    changes = {"train.threads": threads, "train.parallel.workers": count, "train.lazy_rows": "off"}
    return choose(config.replace(**changes)).config
