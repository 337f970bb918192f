"""One method on one table of the bench of look-ups, in a process of one thread.

``python -m cllm.bench.lookup_contestant '{"V": …, "D": …, "method": …}'`` prints one JSON line: the
method's figures, or ``null`` if its index is not whole yet and the time is over. A method's queries take
turns with the exact matrix product's.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from cllm.bench.lookup_peers import PEERS, Ask, Building, K, settings
from cllm.bench.lookup_tables import clustered_table, noisy_rows, table_and_hidden_vectors
from cllm.core.cpu import busy_seconds
from cllm.infer.lookup import TokenIndex

PRODUCT = "matrix product (torch)"
OURS = ("ours, plain scan", "ours, cells", "ours, cells, tuned", "ours, exact")
SETTLED = 0.95
BATCH = 128
SHARES = (256, 128, 64, 32, 16, 8, 4)


def main(case: dict[str, Any]) -> dict[str, Any] | None:
    """A row of the bench's table, with ``others``: processors that other programs used meanwhile.

    ``case``: a table (``V`` and ``D``, or ``run``), ``method``, ``rounds``, ``seconds`` after which a
    half-built index of faiss is put aside (none: never), and ``place``, where.
    """
    until = time.monotonic() + (math.inf if case.get("seconds") is None else case["seconds"])
    torch.set_num_threads(1)
    if case.get("run"):
        table, queries = table_and_hidden_vectors(Path(case["run"]), 512)
        name = "trained"
    else:
        table = clustered_table(case["V"], case["D"])
        queries, name = noisy_rows(table, 512), "clustered"
    method, note = case["method"], ""
    if method in PEERS:
        building = Building(method, table, Path(case["place"]))
        whole_before = building.is_whole
        building.go_on(until)
        if not building.is_whole or (not whole_before and time.monotonic() > until):
            building.keep()
            return None
        asks, seconds = settings(building.index, method), building.seconds
    else:
        asks, seconds, note = _our_way(method, table)
    contest = Contest(table, queries, case["rounds"])
    before, started, own = busy_seconds(), time.monotonic(), sum(os.times()[:2])
    figures = contest.enter(asks, seconds)
    after, took = busy_seconds(), time.monotonic() - started
    others = None
    if before is not None and after is not None:
        others = max(after - before - sum(os.times()[:2]) + own, 0.0) / took
    row = {"table": name, "V": len(table), "D": table.shape[1], "method": method}
    return row | figures | {"note": note, "others": others}


class Contest:
    """Recall and time of a method beside the matrix product's."""

    def __init__(self, table: np.ndarray, queries: np.ndarray, rounds: int) -> None:
        self.table, self.rounds = torch.from_numpy(table), rounds
        self.choice, self.queries = queries[: len(queries) // 2], queries[len(queries) // 2 :]
        # Few singles for the large tables, whose scans take tenths of a second.
        self.singles = 8 if len(table) > 100_000 else 64

    def product(self, q: np.ndarray) -> np.ndarray:
        """The exact matrix product and its top ten."""
        vectors, found = torch.from_numpy(q), []
        if len(q) == 1:
            return torch.topk(torch.mv(self.table, vectors[0]), K).indices[None].numpy()
        for block in vectors.split(64):
            found.append(torch.topk(block @ self.table.T, K, dim=1).indices)
        return torch.cat(found).numpy()

    def enter(self, asks: dict[str, Ask], seconds: float) -> dict[str, Any]:
        """Choose the first setting that finds 95% of the ten (the last if none does) on one half of the
        queries; report the other half."""
        setting, ask = self._choose(asks) if asks else ("", self.product)
        truth = self.product(self.queries)
        found = ask(self.queries) if asks else truth
        ones = [self.queries[i : i + 1] for i in range(self.singles)]
        single = self._race(lambda f: [f(one) for one in ones], ask, len(ones))
        many = self.queries[:BATCH]
        batch = self._race(lambda f: [f(many)], ask, len(many))
        return {
            "setting": setting,
            "recall@1": recall(found[:, :1], truth[:, :1]),
            "recall@10": recall(found, truth),
            "µs, one query": 1e6 * single[1],
            "µs, of 128": 1e6 * batch[1],
            "× product, one": single[0] / single[1],
            "× product, 128": batch[0] / batch[1],
            "build s": seconds,
        }

    def _choose(self, asks: dict[str, Ask]) -> tuple[str, Ask]:
        if len(asks) > 1:
            truth = self.product(self.choice)
            for setting, ask in asks.items():
                if recall(ask(self.choice), truth) >= SETTLED:
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


def _our_way(method: str, table: np.ndarray) -> tuple[dict[str, Ask], float, str]:
    """Settings and how to ask under each, processor seconds to build, and a note."""
    if method == PRODUCT:
        return {}, 0.0, ""
    started = time.process_time()
    index = TokenIndex.build(table, plain=method == "ours, plain scan")
    seconds = time.process_time() - started
    if method == "ours, plain scan":
        return {"": partial(_ours, index)}, seconds, ""
    if method == "ours, exact":
        return {"exact": partial(_ours, index, exact=True)}, seconds, "proved"
    note = f"{index.cells:,} cells"
    if method == "ours, cells":
        return {"default": partial(_ours, index)}, seconds, note
    assert method == "ours, cells, tuned"
    budgets = dict.fromkeys(max(len(table) // share, 128) for share in SHARES)
    return {f"budget={b}": partial(_ours, index, budget=b) for b in budgets}, seconds, note


def _ours(index: TokenIndex, q: np.ndarray, **how: Any) -> np.ndarray:
    return index.query(q, K, **how).ids


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
