"""Measures what the roofline model needs of this machine, in a process of its own.

``python -m cllm.training.plan.probe`` reads one JSON request (``threads``, ``dtype``, ``compiled``,
``cores`` to keep to, and a list of matrix products) from standard input and prints one JSON answer, so that
threads, allocator and peak memory of whoever asks are not touched, nor do they touch what is measured.
Before each measurement it prints ``WAITING`` and waits for a line: several measure the same at the same
time, as workers compute the same at the same time.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from cllm.core.allocator import keep_freed_memory
from cllm.core.config import Config
from cllm.core.memory import peak_rss
from cllm.core.settings import build as configuration
from cllm.training.build import build_step
from cllm.training.choose import DTYPES
from cllm.training.plan.ask import WAITING
from cllm.training.plan.roofline import tasks_of
from cllm.training.plan.trace import Product, trace_step

SETS = [2**e for e in (18, 20, 22, 24, 26, 28)]
"""Bytes of the working sets at which bandwidth is measured: from the first cache to beyond the last."""
LARGEST = 2**32
"""Floating-point operations of a product that is measured; larger ones are cut."""
SECONDS = 0.03
"""Time that a product is measured for."""
CHAIN = 16
RESOLVED: dict[str, Any] = {
    "train.device": "cpu",
    "train.attention": "matmul",
    "train.loss_chunk": 0,
    "train.lazy_rows": "off",
}
TINY: dict[str, Any] = RESOLVED | {
    "model.d_model": 8,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.d_ff": 8,
    "model.context": 4,
    "model.vocab_size": 16,
    "train.batch_size": 2,
}
"""A model so small that its step is nothing but overhead."""

REFERENCE: dict[str, Any] = RESOLVED | {
    "model.preset": "tiny",
    "model.n_layers": 2,
    "model.vocab_size": 2048,
    "train.batch_size": 8,
}
"""A model whose step is measured whole, so as to see what is in no single measurement: caches that one
operation leaves to the next, and memory that several share."""


def reference(threads: int, dtype: str, compiled: bool) -> Config:
    """The configuration of ``REFERENCE``, resolved."""
    return _resolved(REFERENCE, threads, dtype, compiled)


def _resolved(model: dict[str, Any], threads: int, dtype: str, compiled: bool) -> Config:
    changes = {"train.threads": threads, "train.dtype": dtype}
    return configuration(model | changes | {"train.compile": "on" if compiled else "off"})


def main() -> None:
    """Answer the request."""
    asked = json.loads(sys.stdin.readline())
    if asked["cores"]:
        os.sched_setaffinity(0, asked["cores"])
    torch.set_num_threads(asked["threads"])
    keep_freed_memory()
    answer: dict[str, Any] = {}
    if asked["constants"]:
        answer = constants(asked["threads"], asked["dtype"], asked["compiled"])
    products = [Product.of(fields) for fields in asked["products"]]
    answer["products"] = [product_rate(product) for product in products]
    print(json.dumps(answer))


def constants(threads: int, dtype: str, compiled: bool) -> dict[str, Any]:
    """What does not depend on the model's shape."""
    per_call = call_seconds(threads, dtype, compiled)
    base = peak_rss()  # what comes next takes memory that training does not
    light, strided, heavy = element_seconds(compiled)
    return {
        "call": per_call,
        "base_memory": base,
        "light": light,
        "strided": strided,
        "heavy": heavy,
        "stream": [(size, stream_rate(size)) for size in SETS],
        "hand_over": hand_over_seconds(),
        "reference": reference_seconds(threads, dtype, compiled),
    }


def call_seconds(threads: int, dtype: str, compiled: bool) -> float:
    """Seconds that an operation (of compiled code: a group) takes beside its work: a tiny step's."""
    config = _resolved(TINY, threads, dtype, compiled)
    model, step = build_step(config)
    model.train()
    ids = torch.zeros(2, config.model.context, dtype=torch.int64)
    seconds = _seconds(lambda: step([(ids, ids)], 1e-3), at_least=30)
    traced = trace_step(config)
    return seconds / sum(len(tasks_of(part, compiled)) for part in (traced.micro, traced.end))


def reference_seconds(threads: int, dtype: str, compiled: bool) -> float:
    """Seconds of a step of the reference."""
    config = reference(threads, dtype, compiled)
    model, step = build_step(config)
    model.train()
    ids = torch.zeros(config.train.batch_size, config.model.context, dtype=torch.int64)
    return _seconds(lambda: step([(ids, ids)], 1e-3), at_least=40)


def stream_rate(size: int) -> float:
    """Bytes a second of a sum of two tensors, which with its result are ``size`` bytes."""
    count = size // 12
    a, b, out = (torch.ones(count) for _ in range(3))
    return 12 * count / _seconds(lambda: torch.add(a, b, out=out))


def element_seconds(compiled: bool) -> tuple[float, float, float]:
    """Seconds an element: of a simple operation, of one over strides, and of one with an exponential.

    Of compiled code the first is an operation inside fused code, where strides are its own to choose.
    """
    x = torch.full((2**18,), 0.5)
    heads = x.view(8, 64, 8, 64).transpose(1, 2)
    turns = torch.ones(64, 64)

    def chain(x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(CHAIN):
            y = y * x + 0.25
        return y

    def powers(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)

    def each(function: Callable[[], object]) -> float:
        return _seconds(function) / x.numel()

    if not compiled:
        return each(lambda: x * x), each(lambda: heads * turns), each(lambda: powers(x))
    fused, raised = (torch.compile(function, dynamic=False) for function in (chain, powers))
    light = each(lambda: fused(x)) / (2 * CHAIN)
    return light, light, each(lambda: raised(x))


def product_rate(product: Product) -> float:
    """Floating-point operations a second of a product; a large one is cut first."""
    batch, sizes = product.batch, [product.rows, product.inner, product.columns]
    while 2 * batch * sizes[0] * sizes[1] * sizes[2] > LARGEST:
        if batch > 1:
            batch = -(-batch // 2)
        else:
            place = sizes.index(max(sizes))
            sizes[place] = -(-sizes[place] // 2)
    rows, inner, columns = sizes
    dtype = getattr(torch, product.dtype)

    def factor(height: int, width: int, turned: bool) -> torch.Tensor:
        shape = (batch, width, height) if turned else (batch, height, width)
        made = torch.ones(shape, dtype=dtype)
        made = made.transpose(1, 2) if turned else made
        return made[0] if product.batch == 1 else made

    a, b = factor(rows, inner, product.turned[0]), factor(inner, columns, product.turned[1])
    multiply = torch.mm if product.batch == 1 else torch.bmm
    out = multiply(a, b)
    return 2 * batch * rows * inner * columns / _seconds(lambda: multiply(a, b, out=out))


def hand_over_seconds() -> float:
    """Seconds of a message to a thread that waits for it, and back."""
    import threading

    one, other = socket.socketpair()

    def answer() -> None:
        while data := other.recv(16):
            other.sendall(data)

    threading.Thread(target=answer, daemon=True).start()

    def ask() -> None:
        one.sendall(b"0" * 16)
        one.recv(16)

    seconds = _seconds(ask, at_least=50)
    one.close()
    return seconds


def _seconds(function: Callable[[], object], at_least: int = 5) -> float:
    """The median time of a call, after two for warming up, while the other processes do the same."""
    for _ in range(2):
        function()
    _wait_for_the_others()
    taken: list[float] = []
    while len(taken) < at_least or sum(taken) < SECONDS:
        begin = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[len(taken) // 2]


def _wait_for_the_others() -> None:
    print(WAITING, flush=True)
    if not sys.stdin.readline():
        raise SystemExit("nobody asks any more")


if __name__ == "__main__":
    assert set(DTYPES) >= {"fp32", "bf16"}
    main()
