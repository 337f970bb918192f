"""``cllm bench tables``: what a stored token table costs in loss, at equal bytes of the whole file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from cllm.bench.harness import Claim, Options, Result, load_now
from cllm.bench.product_quantization import product_quantized
from cllm.bench.reference import QUICK, reference_run
from cllm.compress import codecs
from cllm.compress.codecs.bases import WORTH
from cllm.core.config import Config
from cllm.core.errors import UserError
from cllm.core.machine import machine
from cllm.core.settings import build, load_config
from cllm.model.cross_entropy import cross_entropy_sum
from cllm.model.restored import restored
from cllm.model.table_statistics import table_statistics
from cllm.model.transformer import Transformer
from cllm.store import checkpoint as checkpoints
from cllm.text.batches import IGNORED, evaluation_windows
from cllm.text.dataset import load_prepared
from cllm.text.packed import PackedTokens

TAKES = frozenset({"data"})

RISES = (0.03, 0.1, 0.3)  # nats a token
SHARE = 0.8  # of the bytes that the best other needs
SCORED = 16_384  # tokens of validation text
OURS = "lattice"
LATTICES: dict[str, dict[str, Any]] = {
    OURS: {},
    f"{OURS}, integers": {"lattice": "z"},
    f"{OURS}, E8": {"lattice": "e8"},
    f"{OURS}, Leech, 64 beams": {"lattice": "leech", "beams": 64},
    f"{OURS}, rotated": {"basis": "rotated"},
    f"{OURS}, not rotated": {"basis": "plain"},
    f"{OURS}, LLL basis": {"basis": "plain", "lattice": "z"},
    f"{OURS}, LLL basis, nearest plane": {"basis": "plain", "lattice": "z", "beams": 1},
    f"{OURS}, frequency^(−1/8)": {"frequency_power": 0.125},
    f"{OURS}, bits at no price": {"price": 0.0},
    f"{OURS}, bits at twice the price": {"price": WORTH},
}
"""The codec as it is by default, and what it chooses among or leaves to the user."""
SHOWN = 0.1
"""The rise at which the latter are held against the default."""

Stored = tuple[int, np.ndarray]
"""Bytes of the file and the table decoded from it."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of one method: ``size`` in bytes, ``rise`` of the loss in nats a token."""

    method: str
    setting: str
    size: int
    rise: float


def run(options: Options) -> Result:
    """Store the tied table of a reference run in every way and score the model with what is read back."""
    load = load_now()
    config = _config(options)
    measure, contestants = _prepare(config, options.quick)
    points = [
        Point(method=method, setting=setting, size=size, rise=measure(table))
        for method, setting, store in contestants
        for size, table in [store()]
    ]
    rows = measure.vocabulary
    return Result(
        bench="tables",
        rows=[_row(point, rows) for point in points],
        claims=[
            *(_claim(points, rise, options.quick) for rise in RISES),
            *(_shown(points, name) for name in LATTICES if name != OURS),
        ],
        notes=[
            f"Rise of validation loss over {measure.base:.4f} nats a token, {measure.tokens:,} tokens"
            f" scored; a table of {rows:,} rows of {measure.width}. Bytes are those of the whole file.",
            "Between points, bytes are interpolated over the logarithm of the rise.",
        ],
        packages=("torch", "numpy", "constriction", "faiss-cpu"),
        load_before=load,
    )


def _config(options: Options) -> Config:
    changes: dict[str, Any] = {"data.paths": options.data, "log.tensorboard": False}
    if options.quick:
        changes |= QUICK
    return build(changes)


def _prepare(
    config: Config, quick: bool
) -> tuple[Measure, list[tuple[str, str, Callable[[], Stored]]]]:
    run = reference_run(config)
    data = load_prepared(run.data)
    if data.validation is None:
        raise UserError("the bench needs a validation split: more text")
    torch.set_num_threads(machine().threads)
    model = restored(load_config(run.config).model, checkpoints.load_weights(run.path), run.path)
    statistics = table_statistics(model, data.train, limit=2048 if quick else 32_768)
    measure = Measure(model, data.validation, 1024 if quick else SCORED)
    metric = codecs.table_metric(statistics.moment)
    return measure, list(_contestants(measure.table, metric, statistics.frequency, quick))


def _contestants(
    table: np.ndarray, metric: np.ndarray, frequency: np.ndarray, quick: bool
) -> Iterator[tuple[str, str, Callable[[], Stored]]]:
    def coded(codec: codecs.Codec) -> Callable[[], Stored]:
        def store() -> Stored:
            data = codec.encode(table, metric, frequency=frequency)
            return len(data), codecs.decode(data)

        return store

    def quantized(parts: int, bits: int) -> Callable[[], Stored]:
        return lambda: product_quantized(table, parts, bits)

    width = table.shape[1]
    for bits in (3, 8) if quick else (2, 3, 4, 8):
        yield "integer rows", f"int{bits}", coded(codecs.Rows(bits=bits))
    for rank in (width // 2,) if quick else (width // 8, width // 4, width // 2):
        yield "PCA, int8", f"rank {rank}", coded(codecs.Pca(rank=rank))
    kinds = ((8, 4),) if quick else ((8, 8), (4, 6), (2, 4), (4, 8), (2, 6))
    for wide, bits in kinds:
        parts = width // wide
        yield "product quantization", f"{parts} × {bits} bits", quantized(parts, bits)
    spread = float(table.std())
    shares = (0.5, 1.0) if quick else (0.35, 0.5, 0.7, 1.0, 1.4, 1.8)
    for name, fields in LATTICES.items():
        for share in shares:
            yield name, f"step {share} σ", coded(codecs.Lattice(step=share * spread, **fields))


class Measure:
    """Scores a model with another table in place of its tied one."""

    def __init__(self, model: Transformer, tokens: PackedTokens, limit: int) -> None:
        assert model.head is None, "the reference run ties its tables"
        self.model = model
        self.table = model.embedding.weight.detach().numpy().copy()
        self.vocabulary, self.width = self.table.shape
        context = model.config.context
        batches = evaluation_windows(tokens, context, 16)
        self.batches = list(islice(batches, max(1, limit // (16 * context))))
        self.tokens = sum(int((targets != IGNORED).sum()) for _, targets in self.batches)
        self.base = 0.0
        self.base = self(self.table)

    def __call__(self, table: np.ndarray) -> float:
        """Rise of the loss in nats a token."""
        weight = self.model.embedding.weight
        with torch.no_grad():
            weight.copy_(torch.from_numpy(table))
            nats = sum(
                float(
                    cross_entropy_sum(
                        self.model.hidden(torch.as_tensor(ids)).flatten(0, 1),
                        weight,
                        torch.as_tensor(targets).flatten(),
                        0,
                    )
                )
                for ids, targets in self.batches
            )
            weight.copy_(torch.from_numpy(self.table))
        return nats / self.tokens - self.base


def _row(point: Point, rows: int) -> dict[str, Any]:
    return {
        "method": point.method,
        "setting": point.setting,
        "bytes": point.size,
        "bits a token": round(8 * point.size / rows, 1),
        "rise, nats a token": round(point.rise, 4),
    }


def bytes_at(points: list[Point], rise: float) -> float | None:
    """Bytes of one method at a rise of the loss, over the logarithm of the rise.

    A setting that another one beats in both counts for nothing. A method whose smallest file already
    costs less than ``rise`` needs at most that; ``None`` for one that does not come down to it.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.size, p.rise)):
        if not best or point.rise < best[-1].rise:
            best.append(point)
    rises = np.maximum([p.rise for p in reversed(best)], 1e-6)
    if not len(rises) or rise < rises[0]:
        return None
    sizes = [p.size for p in reversed(best)]
    return float(np.interp(np.log(rise), np.log(rises), sizes))


def _shown(points: list[Point], name: str) -> Claim:
    """What another way of the codec needs at the same rise: nothing is required of it."""
    default, other = (
        bytes_at([p for p in points if p.method == method], SHOWN) for method in (OURS, name)
    )
    value = None if default is None or other is None else other / default
    return Claim(
        name=f"bytes of {name} at +{SHOWN} nats, over the default's",
        value=value,
        required=None,
        higher_is_better=False,
        why="no points on both sides of this rise" if value is None else "shown, not required",
    )


def _claim(points: list[Point], rise: float, quick: bool) -> Claim:
    methods = dict.fromkeys(point.method for point in points)
    sizes = {m: bytes_at([p for p in points if p.method == m], rise) for m in methods}
    ours = sizes.pop(OURS, None)
    for name in LATTICES:
        sizes.pop(name, None)
    others = {m: size for m, size in sizes.items() if size is not None}
    why = "quick: too small to judge" if quick else ""
    value, name = None, f"bytes of the lattice codec at +{rise} nats, over the best other's"
    if ours is None or not others:
        why = why or "no points on both sides of this rise"
    else:
        best = min(others, key=lambda m: others[m])
        value = ours / others[best]
        name += f" ({best}: {others[best]:,.0f}; ours: {ours:,.0f})"
    return Claim(
        name=name,
        value=value,
        required=SHARE,
        higher_is_better=False,
        why=why,
        judged=not why,
    )
