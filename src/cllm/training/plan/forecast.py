"""A plan: every strategy for a configuration and an amount of text, the best of them, and its command.

Here for machines that the user describes; ``cllm.training.plan.here`` plans for this one.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cllm.core.config import Config
from cllm.core.errors import UsageError
from cllm.training.choose import choose
from cllm.training.plan.estimate import Estimate
from cllm.training.plan.machines import Devices, MachineEntry, devices_of
from cllm.training.plan.pipelines import pipelined
from cllm.training.plan.strategies import replicated, sharded


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
        """What runs it on each machine, with ``options`` of `cllm train`; empty where there is none."""
        asked: list[str] = []
        if estimate.kind == "workers":
            asked.append(f"train.parallel.workers={estimate.strategy.split()[0]}")
        elif estimate.kind in ("ddp", "fsdp"):
            asked.append(f"train.parallel.strategy={estimate.kind}")
        elif estimate.kind == "pipeline":
            micros = estimate.tokens // self.config.model.context // estimate.micro_batch
            if estimate.replicas > 1 or micros % estimate.devices:
                return ""  # on paper only
            asked += ["train.pipeline.mode=stages", f"train.pipeline.micro_batches={micros}"]
        elif ", " in estimate.strategy:
            asked.append(f"train.threads={estimate.strategy.split(', ')[1].split()[0]}")
        words = ["train", *options]
        words += [word for setting in asked for word in ("--set", setting)]
        if estimate.kind not in ("ddp", "fsdp", "pipeline"):
            return f"cllm {shlex.join(words)}"
        each = min(self.per_machine or estimate.devices, estimate.devices)
        nodes = -(-estimate.devices // each)
        meet = f"--nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint=FIRST_MACHINE:29500 "
        return f"torchrun {meet if nodes > 1 else ''}--nproc-per-node={each} -m cllm {shlex.join(words)}"

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


def plan_on(
    config: Config,
    entries: Sequence[MachineEntry],
    counts: Sequence[int],
    tokens: int | None,
) -> Plan:
    """DDP, FSDP and pipelines on machines that the user describes; for each of ``counts`` devices, or all
    there are."""
    refuse(config)
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
        parameters=parameters_of(resolved),
        compiling=0.0,
        notes=notes,
        per_machine=min((e.per_machine or e.count for e in entries), default=None),
    )


def _strategies(config: Config, devices: Devices) -> Iterator[Estimate]:
    yield replicated(config, devices)
    if devices.count == 1:
        return
    yield sharded(config, devices)
    yield pipelined(config, devices)


def _there(config: Config) -> Config:
    """``config`` resolved for devices that are not here: nothing of this machine decides."""
    train = config.train
    changes: dict[str, Any] = {"train.device": "cpu", "train.threads": 1, "train.lazy_rows": "off"}
    changes |= {"train.parallel.workers": 1, "train.compile": "off"}
    if train.attention == "auto":
        changes["train.attention"] = "sdpa"
    resolved = choose(config.replace(**changes)).config
    return resolved if train.compile == "off" else resolved.replace(**{"train.compile": "on"})


def parameters_of(config: Config) -> int:
    """Learned numbers of the model."""
    from cllm.model.transformer import parameter_count

    return parameter_count(config.model)


def refuse(config: Config) -> None:
    """Raise ``UsageError`` for what the model of a step does not cover, by name."""
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
