"""One table of the bench of look-ups, in a process of one thread: every method, one after the other.

``python -m cllm.bench.lookup_contestant '{"V": …, "D": …}'`` prints one JSON line with a list of rows.
A method's queries take turns with the exact matrix product's.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from cllm.bench.lookup_tables import clustered_table, noisy_rows, table_and_hidden_vectors
from cllm.infer.lookup import TokenIndex

Ask = Callable[[np.ndarray], np.ndarray]
K = 10
SETTLED = 0.95
BATCH = 128
HNSW_MOST = 300_000


def main(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of all methods for one table."""
    torch.set_num_threads(1)
    if case.get("run"):
        table, queries = table_and_hidden_vectors(Path(case["run"]), 512)
        name = "trained"
    else:
        table = clustered_table(case["V"], case["D"])
        queries, name = noisy_rows(table, 512), "clustered"
    contest = Contest(table, queries, case.get("rounds", 3))
    rows = []
    for method, asks, seconds, note in methods(table):
        row = {"table": name, "V": len(table), "D": table.shape[1], "method": method}
        rows.append(row | contest.enter(asks, seconds) | {"note": note})
    return rows


class Contest:
    """Recall and time of a method beside the matrix product's."""

    def __init__(self, table: np.ndarray, queries: np.ndarray, rounds: int) -> None:
        self.table, self.rounds = torch.from_numpy(table), rounds
        self.choice, self.queries = queries[: len(queries) // 2], queries[len(queries) // 2 :]
        # Few singles for the large tables, whose scans take tenths of a second.
        self.singles = 8 if len(table) > 100_000 else 64
        self.truth = {id(q): self.product(q) for q in (self.choice, self.queries)}

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
        setting, ask = next(iter((asks or {"": self.product}).items()))
        for name, candidate in asks.items():
            setting, ask = name, candidate
            if recall(ask(self.choice), self.truth[id(self.choice)]) >= SETTLED:
                break
        found = ask(self.queries)
        ones = [self.queries[i : i + 1] for i in range(self.singles)]
        single = self._race(lambda f: [f(one) for one in ones], ask, len(ones))
        many = self.queries[:BATCH]
        batch = self._race(lambda f: [f(many)], ask, len(many))
        truth = self.truth[id(self.queries)]
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


def methods(table: np.ndarray) -> Iterator[tuple[str, dict[str, Ask], float, str]]:
    """(name, settings and how to ask under each, seconds to build, note), one method at a time."""
    yield "matrix product (torch)", {}, 0.0, ""
    yield _scan(table)
    yield from _cells(table)
    yield from _peers(table)


def _scan(table: np.ndarray) -> tuple[str, dict[str, Ask], float, str]:
    started = time.perf_counter()
    scan = TokenIndex.build(table, plain=True)
    seconds = time.perf_counter() - started
    return "ours, plain scan", {"": lambda q: scan.query(q, K).ids}, seconds, ""


def _cells(table: np.ndarray) -> Iterator[tuple[str, dict[str, Ask], float, str]]:
    started = time.perf_counter()
    index = TokenIndex.build(table, plain=False)
    seconds = time.perf_counter() - started
    V = len(table)
    shares = (256, 128, 64, 32, 16, 8, 4)
    budgets = dict.fromkeys(max(V // share, 128) for share in shares)
    asks: dict[str, Ask] = {"default": lambda q: index.query(q, K).ids}
    yield "ours, cells", asks, seconds, f"{index.cells:,} cells"

    def within(budget: int) -> Ask:
        return lambda q: index.query(q, K, budget=budget).ids

    asks = {f"budget={b}": within(b) for b in budgets}
    yield "ours, cells, tuned", asks, seconds, ""
    asks = {"exact": lambda q: index.query(q, K, exact=True).ids}
    yield "ours, exact", asks, seconds, "equal to the scan, proved"


def _peers(table: np.ndarray) -> Iterator[tuple[str, dict[str, Ask], float, str]]:
    """faiss's indexes for inner products; none where it is not installed."""
    if importlib.util.find_spec("faiss") is None:
        return
    faiss = importlib.import_module("faiss")

    faiss.omp_set_num_threads(1)
    V, D = table.shape
    lists = max(4 * round(V**0.5), 16)
    inner = faiss.METRIC_INNER_PRODUCT
    makes: dict[str, Callable[[], Any]] = {
        "faiss Flat": lambda: faiss.IndexFlatIP(D),
        "faiss SQ8": lambda: faiss.IndexScalarQuantizer(D, faiss.ScalarQuantizer.QT_8bit, inner),
        "faiss IVF": lambda: _ivf(faiss, D, lists),
        "faiss HNSW": lambda: faiss.IndexHNSWFlat(D, 16, inner),
    }
    for name, make in makes.items():
        if name == "faiss HNSW" and V > HNSW_MOST:
            continue
        started = time.perf_counter()
        index = make()
        index.train(table)
        index.add(table)
        seconds = time.perf_counter() - started
        yield name, _settings(index, name), seconds, ""
        del index


def _ivf(faiss: Any, D: int, lists: int) -> Any:
    index = faiss.index_factory(D, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = 64, 1
    index.cp.niter = 6
    return index


def _settings(index: Any, name: str) -> dict[str, Ask]:
    """How to ask ``index`` with less and more effort."""

    def ask(place: Any = None, effort: str = "", value: int = 0) -> Ask:
        def search(q: np.ndarray) -> np.ndarray:
            if effort:
                setattr(place, effort, value)
            return np.asarray(index.search(q, K)[1])

        return search

    if name == "faiss IVF":
        probes = (4, 8, 16, 32, 64, 128, 256)
        return {f"nprobe={n}": ask(index, "nprobe", n) for n in probes}
    if name == "faiss HNSW":
        efforts = (16, 32, 64, 128, 256, 512)
        return {f"efSearch={n}": ask(index.hnsw, "efSearch", n) for n in efforts}
    return {"": ask()}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
