"""One table of the bench of look-ups, in a process of one thread: one method after the other.

``python -m cllm.bench.lookup_contestant '{"V": …, "D": …, "methods": […], …}'`` prints one JSON line a
method: its figures, or ``null`` if there was no time. A method's queries take turns with the exact matrix
product's.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from cllm.bench.lookup_peers import PEERS, Ask, Building, K, settings
from cllm.bench.lookup_tables import clustered_table, noisy_rows, table_and_hidden_vectors
from cllm.core.cpu import busy_seconds
from cllm.infer.lookup import TokenIndex
from cllm.infer.lookup.metric import METRICS, row_norms

PRODUCT = "matrix product (torch)"
OURS = (
    "ours, plain scan",
    "ours, cells",
    "ours, cells, tuned",
    "ours, Leech cells, tuned",
    "ours, exact",
    "ours, cells, l2",
    "ours, cells, cosine",
)
SETTLED = 0.95
BATCH = 128
SHARES = (256, 128, 64, 32, 16, 8, 4)


def main(case: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """For each of ``methods`` in turn a row of the bench's table, with ``others``: processors that other
    programs used meanwhile.

    ``case``: a table (``V`` and ``D``, or ``run``), ``methods``, ``rounds``, ``seconds`` after which none
    is begun (none: never), and for each method a place where an index of faiss is put aside that is not
    whole by then (``places``). What there was no time for is ``None``.
    """
    until = time.monotonic() + (math.inf if case["seconds"] is None else case["seconds"])
    torch.set_num_threads(1)
    if case.get("run"):
        table, queries = table_and_hidden_vectors(Path(case["run"]), 512)
        name = "trained"
    else:
        table = clustered_table(case["V"], case["D"])
        queries, name = noisy_rows(table, 512), "clustered"
    contest, ours = cache(partial(Contest, table, queries, case["rounds"])), Ours(table)
    for method, place in zip(case["methods"], case["places"], strict=True):
        if time.monotonic() > until:
            yield None
            continue
        if method in PEERS:
            building = Building(method, table, Path(place))
            if not building.is_whole:
                building.go_on(until)
                if not building.is_whole or time.monotonic() > until:
                    building.keep()
                    yield None
                    continue
            asks, seconds, note = settings(building.index, method), building.seconds, ""
        else:
            asks, seconds, note = ours.ways(method)
        row = {"table": name, "V": len(table), "D": table.shape[1], "method": method}
        figures = contest(metric_of(method)).enter(asks, seconds)
        yield row | figures | {"note": note}


def metric_of(method: str) -> str:
    """What "close" means to a method: inner products, unless its name ends in another metric."""
    last = method.split(", ")[-1]
    return last if last in METRICS else "ip"


class Contest:
    """Recall and time of a method beside the matrix product's, under one metric."""

    def __init__(self, table: np.ndarray, queries: np.ndarray, rounds: int, metric: str) -> None:
        self.rounds = rounds
        self.choice, self.queries = queries[: len(queries) // 2], queries[len(queries) // 2 :]
        # Few singles for the large tables, whose scans take tenths of a second.
        self.singles = 8 if len(table) > 100_000 else 64
        self._truths: dict[int, np.ndarray] = {}
        norms = torch.from_numpy(row_norms(table)).float()
        whole = torch.from_numpy(table)
        self.table = whole / norms[:, None].clamp(min=1e-30) if metric == "cosine" else whole
        self.shift = norms.square() / 2 if metric == "l2" else None

    def truth(self, q: np.ndarray) -> np.ndarray:
        """The true ten of ``choice`` or ``queries``, computed once."""
        if id(q) not in self._truths:
            self._truths[id(q)] = self.product(q)
        return self._truths[id(q)]

    def product(self, q: np.ndarray) -> np.ndarray:
        """The exact matrix product, what the metric makes of it, and its top ten."""
        vectors, found = torch.from_numpy(q), []
        if len(q) == 1:
            return torch.topk(self._keys(torch.mv(self.table, vectors[0])), K).indices[None].numpy()
        for block in vectors.split(64):
            found.append(torch.topk(self._keys(block @ self.table.T), K, dim=1).indices)
        return torch.cat(found).numpy()

    def _keys(self, products: torch.Tensor) -> torch.Tensor:
        return products if self.shift is None else products.sub_(self.shift)

    def enter(self, asks: dict[str, Ask], seconds: float) -> dict[str, Any]:
        """Choose the first setting that finds 95% of the ten (the last if none does) on one half of the
        queries; report the other half."""
        before, started, own = busy_seconds(), time.monotonic(), time.process_time()
        setting, ask = self._choose(asks) if asks else ("", self.product)
        truth = self.truth(self.queries)
        found = ask(self.queries) if asks else truth
        ones = [self.queries[i : i + 1] for i in range(self.singles)]
        single = self._race(lambda f: [f(one) for one in ones], ask, len(ones))
        many = self.queries[:BATCH]
        batch = self._race(lambda f: [f(many)], ask, len(many))
        own, took, after = time.process_time() - own, time.monotonic() - started, busy_seconds()
        others = None
        if before is not None and after is not None:
            others = max(after - before - own, 0.0) / took
        return {
            "setting": setting,
            "recall@1": recall(found[:, :1], truth[:, :1]),
            "recall@10": recall(found, truth),
            "µs, one query": 1e6 * single[1],
            "µs, of 128": 1e6 * batch[1],
            "× product, one": single[0] / single[1],
            "× product, 128": batch[0] / batch[1],
            "build s": seconds,
            "others": others,
        }

    def _choose(self, asks: dict[str, Ask]) -> tuple[str, Ask]:
        if len(asks) > 1:
            for setting, ask in asks.items():
                if recall(ask(self.choice), self.truth(self.choice)) >= SETTLED:
                    return setting, ask
        return list(asks.items())[-1]

    def _race(self, go: Callable[[Ask], Any], ask: Ask, count: int) -> tuple[float, float]:
        """Median seconds a query of the matrix product and of ``ask``, taking turns."""
        took: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.rounds):
            for who, seconds in zip((self.product, ask), took, strict=True):
                started = time.perf_counter()
                go(who)
                seconds.append((time.perf_counter() - started) / count)
        return median(took[0]), median(took[1])


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true ids that were found."""
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]
    return float(np.sum(hits) / truth.size)


class Ours:
    """Ways to ask our indexes of a table; one is built for all methods that use its cells."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self._cells: dict[str, tuple[TokenIndex, float]] = {}

    def ways(self, method: str) -> tuple[dict[str, Ask], float, str]:
        """Settings and how to ask under each, processor seconds to build, and a note."""
        if method == PRODUCT:
            return {}, 0.0, ""
        if method == "ours, plain scan":
            index, seconds = self._built(plain=True)
            return {"": partial(_ours, index)}, seconds, ""
        lattice = "leech" if "Leech" in method else "e8"
        if lattice not in self._cells:
            self._cells[lattice] = self._built(plain=False, lattice=lattice)
        index, seconds = self._cells[lattice]
        if method == "ours, exact":
            return {"exact": partial(_ours, index, exact=True)}, seconds, "proved"
        note = f"{index.cells:,} cells"
        if not method.endswith("tuned"):
            return {"default": partial(_ours, index, metric=metric_of(method))}, seconds, note
        budgets = dict.fromkeys(max(len(self.table) // share, 128) for share in SHARES)
        return {f"budget={b}": partial(_ours, index, budget=b) for b in budgets}, seconds, note

    def _built(self, **how: Any) -> tuple[TokenIndex, float]:
        started = time.process_time()
        return TokenIndex.build(self.table, **how), time.process_time() - started


def _ours(index: TokenIndex, q: np.ndarray, **how: Any) -> np.ndarray:
    return index.query(q, K, **how).ids


if __name__ == "__main__":
    for figures in main(json.loads(sys.argv[1])):
        print(json.dumps(figures), flush=True)
