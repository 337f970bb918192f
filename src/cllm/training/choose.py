"""What ``"auto"`` means on this machine: device, threads, precision, attention path, compilation.

Every choice comes with its reason, in one line. The rules, and the measurements behind them, are in
``docs/speed.md``; a value given in the configuration is taken as it is, or refused if it cannot be.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from cllm.core.config import Config, TrainConfig
from cllm.core.cpu import is_busy, team_threads
from cllm.core.errors import UsageError, UserError
from cllm.core.machine import cannot_compile, machine
from cllm.core.measurements import recall, remember
from cllm.core.torchrun import launched
from cllm.model.transformer import flops_per_token
from cllm.training.distributed.check import check_launch, check_team, runs_eagerly
from cllm.training.parallel.shards import deal, most_workers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BF16_PAYS = 1.5
"""bf16 products must be this many times faster than fp32 ones to be worth their rounding and casts."""
COMPILE_SHARE = 0.4
"""Of a time budget, what cold compilation may take: the compiled step is at least twice as fast."""
LOGITS_AT_ONCE = 256 * 2**20
"""Bytes of logits above which head and loss are computed in chunks of a quarter of that."""
LAZY_FROM = 32_768
"""Tokens from which on updating tables by rows pays: a step was shorter with 65,536 and longer with 4,096,
which in a line meet at some 18,000 (``docs/embeddings.md``)."""
MATMUL_CONTEXT = {"on": 1024, "off": 512}
"""Longest context, compiled or not, for which explicit attention was measured to beat the fused kernel
on a CPU (``docs/results/attention.md``)."""
# Seconds of products that are enough to tell a dtype's rate.
_ENOUGH = 0.3


def arithmetic(train: TrainConfig) -> torch.dtype:
    """The type that ``train.dtype`` names; float64 where that is torch's default, which proofs set."""
    double = torch.get_default_dtype() == torch.float64
    return torch.float64 if double else DTYPES[train.dtype]


@dataclass
class Choices:
    """The configuration with every ``auto`` resolved, and why."""

    config: Config
    reasons: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """What was asked for and will be slow."""

    def settle(self, key: str, value: Any, reason: str) -> None:
        """Set ``train.key`` and remember why."""
        self.config = self.config.replace(**{f"train.{key}": value})
        self.reasons[key] = f"{value}: {reason}"

    def lines(self) -> list[str]:
        """One line a choice."""
        return [f"{key} {reason}" for key, reason in self.reasons.items()]


def choose(config: Config, *, seconds: float | None = None) -> Choices:
    """Resolve what is ``auto`` in ``config.train``. ``model.vocab_size`` must be known.

    ``seconds`` is a time budget, which will choose the steps; without one, they are known. Raises
    ``UserError`` or ``UsageError`` where what was asked for is not to be had.
    """
    choices = Choices(config)
    _choose_device(choices)
    delayed = choices.config.train.pipeline.mode == "delayed"
    if delayed and choices.config.train.device != "cpu":
        raise UsageError(
            f"train.pipeline.mode = 'delayed' is for the CPU, and train.device is "
            f"{choices.config.train.device!r} here; set it to cpu"
        )
    launch = launched()
    if launch is None:
        check_launch(config)
        _choose_workers(choices)
    else:
        check_team(config, launch)
        choices.config = choices.config.replace(**{"train.parallel.workers": 1})
    if choices.config.train.threads == "auto":
        here = machine()
        why = f"{here.cores} cores" + (f", quota {here.quota:g}" if here.quota else "")
        if delayed:
            choices.settle("threads", 1, "the stages of the pipeline share the cores")
        elif launch is not None and launch.local_size > 1:
            share = max(here.threads // launch.local_size, 1)
            choices.settle("threads", share, f"{launch.local_size} processes share the {why}")
        elif choices.config.train.parallel.workers == 1:
            threads = team_threads()
            if threads < here.threads:
                why = f"OMP_NUM_THREADS = {threads}"
            choices.settle("threads", threads, why)
        else:
            choices.settle("threads", 1, "the workers share the cores")
    assert isinstance(choices.config.train.threads, int)
    with _threads(choices.config.train.threads):
        _choose_dtype(choices)
        _choose_compile(choices, seconds)
    _choose_attention(choices)
    _choose_chunk(choices)
    _choose_lazy_rows(choices)
    return choices


def matmul_rates(threads: int) -> dict[str, float]:
    """Floating-point operations a second of (2048, 128) @ (128, 4096) by precision, on the CPU.

    Measured in a fraction of a second, once for a machine, torch version and number of threads (each
    time anew while other programs keep the machine busy).
    """
    known = recall("matmul", threads=threads)
    if known is None:
        known = {name: _matmul_rate(DTYPES[name]) for name in ("fp32", "bf16")}
        if not is_busy(threads):  # a figure that others spoiled is not for keeping
            remember("matmul", known, threads=threads)
    return known


def _matmul_rate(dtype: torch.dtype, repeats: int = 9) -> float:
    rows, inner, columns = 2048, 128, 4096
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    seconds: list[float] = []
    # Where products of a dtype are emulated one takes as long as all of another's, and says enough.
    while len(seconds) < repeats and sum(seconds) < _ENOUGH:
        begin = time.perf_counter()
        torch.mm(a, b.T, out=out)
        seconds.append(time.perf_counter() - begin)
    return 2.0 * rows * inner * columns / min(seconds[1:] or seconds)


class _threads:  # noqa: N801 - reads as a statement: `with _threads(2):`
    def __init__(self, count: int) -> None:
        self.count, self.before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.count)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


def _choose_device(choices: Choices) -> None:
    asked = choices.config.train.device
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if asked == "auto":
        found = next((name for name, is_there in there.items() if is_there()), "cpu")
        why = "no GPU that torch can use" if found == "cpu" else "torch can use it"
        choices.settle("device", found, why)
    elif asked != "cpu" and not there[asked.split(":")[0]]():
        raise UserError(
            f"train.device = {asked!r}, but this torch ({torch.__version__}) finds no such device; "
            "use train.device=cpu"
        )
    elif asked.startswith("cuda:") and int(asked[5:]) >= torch.cuda.device_count():
        raise UserError(f"train.device = {asked!r}: there are {torch.cuda.device_count()} devices")


def _choose_workers(choices: Choices) -> None:
    """``auto``: as many as there are cores, where nothing speaks against it. Others are checked."""
    config, cores = choices.config, machine().threads
    asked = config.train.parallel.workers
    train = config.train
    most = most_workers(train.batch_size, train.accumulate, cores)
    workers = most if asked == "auto" else asked
    against = [f"{setting} {why}" for setting, why in config.against_workers()]
    if config.train.pipeline.mode == "delayed":
        against.append("train.pipeline.mode = 'delayed' trains in one process; set it to off")
    if workers > 1 and not hasattr(os, "memfd_create"):
        against.append(
            f"train.parallel.workers = {workers}: workers share memory through memfd, which Linux alone "
            "has; set it to 1"
        )
    try:
        deal(config.train.batch_size, config.train.accumulate, workers)
    except ValueError as error:
        against.append(str(error))
    if asked == "auto":
        if against:
            choices.settle("parallel.workers", 1, against[0])
        else:
            why = f"{cores} cores"
            if workers < cores:
                why += (
                    f", and train.batch_size = {train.batch_size} (train.accumulate = {train.accumulate}) "
                    "divides among no more of them"
                )
            choices.settle("parallel.workers", workers, why)
    elif workers > 1 and against:
        raise UsageError(against[0])
    elif workers > cores:
        choices.warnings.append(
            f"train.parallel.workers = {workers} are more than the {cores} cores here: they take "
            f"turns, and train no faster than {cores}"
        )


def _choose_dtype(choices: Choices) -> None:
    train = choices.config.train
    if train.dtype != "auto":
        return
    if train.device.startswith("cuda"):
        if torch.cuda.is_bf16_supported():
            choices.settle("dtype", "bf16", "the GPU has it")
        else:
            choices.settle("dtype", "fp16", "the GPU has no bf16; with loss scaling")
    elif train.device == "mps":
        choices.settle("dtype", "fp32", "the precision tested on MPS")
    else:
        assert isinstance(train.threads, int)
        rates = matmul_rates(train.threads)
        gain = rates["bf16"] / rates["fp32"]
        why = f"bf16 products were measured {gain:.1f} times as fast as fp32 ones here"
        choices.settle("dtype", "bf16" if gain >= BF16_PAYS else "fp32", why)


def _choose_compile(choices: Choices, seconds: float | None) -> None:
    train = choices.config.train
    if train.compile == "off":
        return
    obstacle = None
    if train.device == "mps":
        obstacle = "not tested on MPS"
    elif not train.device.startswith("cuda"):
        obstacle = cannot_compile()
    if train.optimizer_in_backward:
        obstacle = "compiled code has all gradients at once"
    elif launched() is not None and runs_eagerly(train):
        obstacle = "shards and stages run uncompiled"
    if train.compile == "on":
        if obstacle:
            raise UsageError(f"train.compile = 'on', but {obstacle}; use train.compile=auto or off")
        return
    if obstacle:
        choices.settle("compile", "off", obstacle)
        return
    cost = compile_seconds(choices.config)
    if seconds is not None:
        pays = cost <= seconds * COMPILE_SHARE
        why = f"compiling takes up to {cost:.0f} s of {seconds:,.0f}"
        choices.settle("compile", "on" if pays else "off", why)
        return
    saved = _compile_gain(choices.config)
    if saved > cost:
        choices.settle("compile", "on", f"saves about {saved:,.0f} s for {cost:.0f} s of compiling")
    else:
        why = f"the run is short: it would save about {saved:.0f} s and cost {cost:.0f} s"
        choices.settle("compile", "off", why)


def compile_seconds(config: Config) -> float:
    """Rough seconds to compile training and validation with a cold cache (measured: docs/speed.md)."""
    return 12.0 + 5.0 * config.model.n_layers


def _compile_gain(config: Config) -> float:
    """Rough seconds that compiling saves: eager steps reach a third of the matmul rate, compiled two.

    Workers, or the processes of torchrun, take a share of the windows each.
    """
    train, model = config.train, config.model
    if train.device.startswith("cuda"):
        return float("inf") if train.steps >= 300 else 0.0
    assert isinstance(train.threads, int)
    rate = matmul_rates(train.threads)["bf16" if train.dtype == "bf16" else "fp32"]
    launch, workers = launched(), train.parallel.workers
    assert isinstance(workers, int)
    sharing = workers if launch is None else launch.size
    return config.tokens_seen / sharing * flops_per_token(model) / rate * (3.0 - 1.5)


def _choose_attention(choices: Choices) -> None:
    train, context = choices.config.train, choices.config.model.context
    if train.attention != "auto":
        return
    if train.device != "cpu":
        choices.settle("attention", "sdpa", f"the fused kernel of {train.device}")
        return
    longest = MATMUL_CONTEXT[train.compile]
    if context <= longest:
        why = f"explicit matrix products are faster here up to context {longest}"
        choices.settle("attention", "matmul", why)
    else:
        why = f"context {context} > {longest}: its score matrices cost more than they save"
        choices.settle("attention", "sdpa", why)


def _choose_chunk(choices: Choices) -> None:
    config = choices.config
    if config.train.pipeline.mode == "stages":
        if config.train.loss_chunk == "auto":
            choices.settle(
                "loss_chunk", 0, "the last stage takes all logits of a micro-batch at once"
            )
        elif config.train.loss_chunk:
            choices.warnings.append(
                f"train.loss_chunk = {config.train.loss_chunk} is not used: the last stage takes all "
                "logits of a micro-batch at once; raise train.pipeline.micro_batches to make them fewer"
            )
        return
    if config.train.loss_chunk != "auto":
        return
    assert config.model.vocab_size is not None
    width = 4 if config.train.dtype == "fp32" else 2
    rows = config.train.batch_size * config.model.context
    row = config.model.vocab_size * width
    if rows * row <= LOGITS_AT_ONCE:
        choices.settle("loss_chunk", 0, f"{rows * row / 2**20:.0f} MiB of logits fit at once")
    else:
        chunk = max(LOGITS_AT_ONCE // 4 // row, 1)
        choices.settle("loss_chunk", chunk, f"{rows * row / 2**20:,.0f} MiB of logits are too many")


def _choose_lazy_rows(choices: Choices) -> None:
    config = choices.config
    if config.train.lazy_rows != "auto":
        return
    alone = (
        config.train.parallel.workers == 1
        and launched() is None
        and config.train.pipeline.mode == "off"
    )
    if not config.rows_can_idle or not alone:
        # The usual case, and no choice.
        choices.config = config.replace(**{"train.lazy_rows": "off"})
        return
    size = config.model.vocab_size
    assert size is not None
    if config.train.momentum_outlasts_scale:
        choices.settle(
            "lazy_rows", "off", "what an idle row does has no closed form with these betas"
        )
    elif size >= LAZY_FROM:
        choices.settle("lazy_rows", "on", f"with {LAZY_FROM:,} tokens or more it saves time")
    else:
        choices.settle("lazy_rows", "off", f"with fewer than {LAZY_FROM:,} tokens it saves no time")
