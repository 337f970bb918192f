"""One contestant of ``cllm bench original``, in a process of its own."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cllm.bench.harness import answer_rounds
from cllm.bench.original import BATCH, BATCHES, LENGTH, ROWS, read_words, word_ids
from cllm.core.config import Config
from cllm.core.settings import merge, parse_setting
from cllm.model.transformer import Transformer, flops_per_token, parameter_count
from cllm.training import build as building
from cllm.training.choose import choose, matmul_rates
from cllm.training.pipeline.delayed import Delayed

Batches = list[tuple[Tensor, Tensor]]
Step = Callable[[Tensor, Tensor], float]
Reset = Callable[[], None]
Train = Callable[[Batches, int], float]
"""All epochs of the batches; returns the mean training loss of the last."""


def main() -> None:
    """Build, compile, warm up; then train the whole workload anew for each round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("ours", "plain"))
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--simdlen", type=int)
    parser.add_argument("--give-memory-back", action="store_true")
    parser.add_argument("--words", required=True)
    parser.add_argument("--epochs", type=int, required=True)
    args = parser.parse_args()
    if args.simdlen is not None:
        import torch._inductor.config as inductor

        inductor.cpp.simdlen = args.simdlen
    if args.give_memory_back:
        building.keep_freed_memory = lambda: False
    config = workload(args.epochs, args.settings)
    batches = windows(read_words(args.words))
    reset, train = ours(config) if args.who == "ours" else plain(config)
    begin = time.perf_counter()
    train(batches, 1)
    start_seconds = time.perf_counter() - begin
    threads = config.train.threads
    assert isinstance(threads, int)

    def one_round() -> dict[str, Any]:
        reset()
        begin = time.perf_counter()
        loss = train(batches, args.epochs)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "loss": loss, "steps": args.epochs * len(batches)}

    ready = {
        "start_seconds": start_seconds,
        "parameters": parameter_count(config.model),
        "flops_per_token": flops_per_token(config.model),
        "matmul_peak": max(matmul_rates(threads).values()),
    }
    answer_rounds(ready, one_round)


def workload(epochs: int, settings: list[str]) -> Config:
    """The older system's model and batch in our terms."""
    changes: dict[str, Any] = {
        "model.vocab_size": ROWS,
        "model.d_model": 128,
        "model.n_layers": 2,
        "model.n_heads": 4,
        "model.d_ff": 512,
        "model.mlp": "gelu",
        "model.norm": "layernorm",
        "model.positions": "learned",
        "model.context": LENGTH,
        "train.batch_size": BATCH,
        "train.steps": epochs * BATCHES,
        "train.lr": 2e-3,
        "train.weight_decay": 0.0,
        "train.schedule": "constant",
    }
    config = merge(Config(), changes | dict(map(parse_setting, settings)))
    return choose(config).config


def windows(words: list[str]) -> Batches:
    """Nine batches of 4×32 words and their followers; the 1,241 words are read as a circle."""
    ids = torch.from_numpy(word_ids(words))
    starts = torch.arange(BATCHES * BATCH) * LENGTH
    places = (starts[:, None] + torch.arange(LENGTH + 1)) % len(ids)
    grid = ids[places].view(BATCHES, BATCH, LENGTH + 1)
    return [(g[:, :-1].contiguous(), g[:, 1:].contiguous()) for g in grid]


def by_steps(step: Step, batches: Batches, epochs: int) -> float:
    """Train, one step after the other."""
    losses: list[float] = []
    for _ in range(epochs):
        losses = [step(*batch) for batch in batches]
    return sum(losses) / len(losses)


def in_pipeline(delayed: Delayed, rate: float, batches: Batches, epochs: int) -> float:
    """Train through the three stages, drained at the end."""
    losses: deque[float] = deque(maxlen=len(batches))
    for batch in batches * epochs:
        delayed.submit([batch], rate)
        if delayed.in_flight > delayed.delay:
            losses.append(delayed.result().loss)
    while delayed.in_flight:
        losses.append(delayed.result().loss)
    delayed.settle()
    return sum(losses) / len(losses)


def ours(config: Config) -> tuple[Reset, Train]:
    """A function that begins anew, and training by the step of ``cllm train``."""
    model, step = building.build(config)
    model.train()
    rate = config.train.lr
    arena, first = step.arena, step.arena.weights.clone()

    def reset() -> None:
        arena.weights.copy_(first)
        for flat in (*arena.moments.values(), *step.counters.values()):
            flat.zero_()
        step.counters["loss_scale"].fill_(1.0)
        arena.refresh()

    if config.train.pipeline.mode == "delayed":
        return reset, partial(in_pipeline, Delayed(step), rate)
    return reset, partial(by_steps, lambda ids, targets: step([(ids, targets)], rate).loss)


def plain(config: Config) -> tuple[Reset, Train]:
    """The same model in the usual loop: autograd, fused AdamW, clipping."""
    train = config.train
    torch.set_num_threads(1)
    model = Transformer(config.model, attention="sdpa")
    holder: dict[str, torch.optim.Optimizer] = {}

    def reset() -> None:
        model.start(train.seed)
        holder["optimizer"] = torch.optim.AdamW(
            model.parameters(),
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
            fused=True,
        )

    def step(ids: Tensor, targets: Tensor) -> float:
        loss = functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        holder["optimizer"].step()
        holder["optimizer"].zero_grad(set_to_none=True)
        return float(loss.detach())

    reset()
    return reset, partial(by_steps, step)


if __name__ == "__main__":
    main()
