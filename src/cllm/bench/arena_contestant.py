"""One contestant of ``cllm.bench.arena``, in a process of its own."""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from cllm.bench.harness import answer_rounds
from cllm.core.allocator import keep_freed_memory
from cllm.core.config import Config
from cllm.core.memory import peak_rss
from cllm.core.settings import merge
from cllm.model.transformer import Transformer
from cllm.training.arena import Arena
from cllm.training.optimizer import OPTIMIZERS
from cllm.training.update import Update

VOCABULARY = 4096
SECONDS = 0.15
"""About how long a round takes."""
Step = Callable[[], None]


def main() -> None:
    """Parse, warm up, and answer rounds with seconds of one end of a step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("ours", "torch"))
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--preset", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # torch.optim loads it, and so does a process that trains compiled, whoever makes its step.
    importlib.import_module("torch._dynamo")
    keep_freed_memory()
    config = merge(Config(), {"model.preset": args.preset, "model.vocab_size": VOCABULARY})
    model = Transformer(config.model)
    model.start(0)
    parameters = sum(p.numel() for p in model.parameters())
    step = theirs(config, model) if args.who == "torch" else ours(config, model)
    begin, calls = time.perf_counter(), 0
    while calls < 5 or time.perf_counter() - begin < SECONDS:  # warm up, and see how long it takes
        step()
        calls += 1
    repeats = max(round(SECONDS * calls / (time.perf_counter() - begin)), 1)

    def one_round() -> dict[str, Any]:
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        return {"seconds": (time.perf_counter() - begin) / repeats, "peak_rss": peak_rss()}

    answer_rounds({"parameters": parameters}, one_round)


def ours(config: Config, model: Transformer) -> Step:
    """The arena's update, with a gradient whose norm is above the bound at first, as torch's is."""
    train = config.train
    arena = Arena.adopt(model, torch.float32, OPTIMIZERS[train.optimizer].moments)
    update = Update(arena, train)
    arena.grad.normal_(std=1e-2)
    count = 0

    def step() -> None:
        nonlocal count
        norm = update.norm(arena.grad)
        if math.isfinite(norm):
            count += 1
            update.apply(arena.grad, norm, 1.0, train.lr, count)

    return step


def theirs(config: Config, model: Transformer) -> Step:
    """torch's, which scales the gradients in place: their norm is then the bound itself."""
    train, parameters = config.train, list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-2

    def step() -> None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, train.clip, foreach=True)
        if math.isfinite(float(norm)):
            optimizer.step()

    return step


if __name__ == "__main__":
    main()
