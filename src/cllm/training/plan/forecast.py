"""A plan: every strategy for a configuration, an amount of text and some machines, and the best of them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cllm.core.config import Config
from cllm.core.errors import UsageError
from cllm.core.machine import machine
from cllm.core.memory import available_memory
from cllm.training.choose import choose, compile_seconds
from cllm.training.plan.calibrate import Constants, constants
from cllm.training.plan.machines import Devices, MachineEntry, devices_of
from cllm.training.plan.strategies import (
    Estimate,
    one_process,
    pipelined,
    replicated,
    sharded,
    workers,
)
from cllm.training.plan.work import products_of, with_rows

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimates side by side. ``tokens``: those of the text, if it is known; ``parameters`` of the model;
    ``compiling``: at most so many seconds before the first step; ``notes``: what else is to be said."""

    config: Config
    where: str
    estimates: list[Estimate]
    tokens: int | None
    parameters: int
    compiling: float
    notes: list[str]
    per_machine: int | None = None

    @property
    def best(self) -> Estimate | None:
        """The fastest that can be."""
        possible = [estimate for estimate in self.estimates if not estimate.obstacle]
        return max(possible, key=lambda e: e.tokens_per_second, default=None)

    def hours(self, estimate: Estimate) -> float | None:
        """Hours for one pass over the text."""
        if not self.tokens or not estimate.tokens_per_second:
            return None
        return (self.tokens / estimate.tokens_per_second + self.compiling) / 3600

    def command(self, estimate: Estimate, options: Sequence[str] = ()) -> str:
        """What runs it, with ``options`` of `cllm train`; empty where there is no command for it."""
        asked: list[str] = []
        if estimate.kind == "workers":
            asked.append(f"train.parallel.workers={estimate.strategy.split()[0]}")
        elif estimate.kind in ("ddp", "fsdp"):
            asked.append(f"train.parallel.strategy={estimate.kind}")
        elif estimate.kind == "pipeline":
            return ""
        elif ", " in estimate.strategy:
            asked.append(f"train.threads={estimate.strategy.split(', ')[1].split()[0]}")
        words = ["train", *options]
        words += [word for setting in asked for word in ("--set", setting)]
        if estimate.kind not in ("ddp", "fsdp"):
            return f"cllm {shlex.join(words)}"
        each = min(self.per_machine or estimate.devices, estimate.devices)
        nodes = -(-estimate.devices // each)
        head = f"torchrun --nnodes={nodes} " if nodes > 1 else "torchrun "
        return f"{head}--nproc-per-node={each} -m cllm {shlex.join(words)}"

    def to_json(self) -> dict[str, Any]:
        """One object: seconds, bytes and tokens."""
        best = self.best
        return {
            "where": self.where,
            "parameters": self.parameters,
            "tokens": self.tokens,
            "compiling_seconds": self.compiling,
            "estimates": [
                asdict(e)
                | {
                    "step_seconds": e.seconds,
                    "tokens_per_second": e.tokens_per_second,
                    "memory_total": e.memory.total,
                    "hours": self.hours(e),
                }
                for e in self.estimates
            ],
            "best": best.strategy if best is not None else None,
            "notes": self.notes,
        }


def plan_here(config: Config, tokens: int | None, say: Say) -> Plan:
    """One process and workers on this machine, whose constants are measured if they are not known."""
    _refuse(config)
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
        parameters=_parameters(resolved),
        compiling=compile_seconds(resolved) if chosen.compile == "on" else 0.0,
        notes=notes,
    )


def plan_on(
    config: Config,
    entries: Sequence[MachineEntry],
    counts: Sequence[int],
    tokens: int | None,
) -> Plan:
    """DDP, FSDP and pipelines on machines that the user describes; for each of ``counts`` devices, or all
    there are."""
    _refuse(config)
    if config.train.dtype == "auto":
        dtype = "bf16" if all("bf16" in entry.tflops for entry in entries) else "fp32"
        config = config.replace(**{"train.dtype": dtype})
    resolved = _there(config)
    estimates: list[Estimate] = []
    for count in counts or [devices_of(entries, resolved.train.dtype).count]:
        devices = devices_of(entries, resolved.train.dtype, count)
        estimates += _strategies(resolved, devices)
    notes = [
        f"arithmetic {resolved.train.dtype}, attention {resolved.train.attention}, fused code; on paper: "
        "rates, memory and links are those of the list, and nothing is taken to overlap",
        f"a step of {config.train.batch_size * config.train.accumulate:,} windows of "
        f"{config.model.context:,} tokens",
    ]
    return Plan(
        config=resolved,
        where=devices.name,
        estimates=estimates,
        tokens=tokens,
        parameters=_parameters(resolved),
        compiling=0.0,
        notes=notes,
        per_machine=min((e.per_machine or e.count for e in entries), default=None),
    )


def constants_of(config: Config, say: Say) -> Constants:
    """This machine's constants for the shapes of one process of ``config`` (resolved), beside as many others
    as it has workers."""
    from cllm.training.parallel.shards import deal

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


def _strategies(config: Config, devices: Devices) -> Iterator[Estimate]:
    yield replicated(config, devices)
    if devices.count == 1:
        return
    yield sharded(config, devices)
    yield pipelined(config, devices)


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


def _there(config: Config) -> Config:
    """``config`` resolved for devices that are not here: nothing of this machine decides."""
    train = config.train
    changes: dict[str, Any] = {"train.device": "cpu", "train.threads": 1, "train.lazy_rows": "off"}
    changes |= {"train.parallel.workers": 1, "train.compile": "off"}
    if train.attention == "auto":
        changes["train.attention"] = "sdpa"
    resolved = choose(config.replace(**changes)).config
    return resolved if train.compile == "off" else resolved.replace(**{"train.compile": "on"})


def _parameters(config: Config) -> int:
    from cllm.model.transformer import parameter_count

    return parameter_count(config.model)


def _refuse(config: Config) -> None:
    """What the model of a step does not cover, by name."""
    table = config.model.embedding
    against = [
        (table.is_composed, f"model.embedding.kind = {table.kind!r}", "'dense' or 'reduced'"),
        (table.lattice != "none", f"model.embedding.lattice = {table.lattice!r}", "'none'"),
        (config.train.loss != "exact", f"train.loss = {config.train.loss!r}", "'exact'"),
        (bool(config.train.similarity.weight), "train.similarity.weight", "0"),
        (config.train.lazy_rows == "on", "train.lazy_rows = 'on'", "'off'"),
    ]
    for applies, setting, instead in against:
        if applies:
            raise UsageError(
                f"{setting} is not covered by the plan's model of a step; plan with {instead}"
            )
