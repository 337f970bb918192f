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
from functools import partial
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
SHARES = (256, 128, 64, 32, 16, 8, 4)
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
        setting, ask = self._choose(asks) if asks else ("", self.product)
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

    def _choose(self, asks: dict[str, Ask]) -> tuple[str, Ask]:
        for setting, ask in asks.items():
            if recall(ask(self.choice), self.truth[id(self.choice)]) >= SETTLED:
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


def methods(table: np.ndarray) -> Iterator[tuple[str, dict[str, Ask], float, str]]:
    """(name, settings and how to ask under each, seconds to build, note), one method at a time."""
    yield "matrix product (torch)", {}, 0.0, ""
    scan, seconds = _built(lambda: TokenIndex.build(table, plain=True))
    yield "ours, plain scan", {"": partial(_ours, scan)}, seconds, ""
    del scan
    index, seconds = _built(lambda: TokenIndex.build(table, plain=False))
    yield "ours, cells", {"default": partial(_ours, index)}, seconds, f"{index.cells:,} cells"
    budgets = dict.fromkeys(max(len(table) // share, 128) for share in SHARES)
    tuned: dict[str, Ask] = {f"budget={b}": partial(_ours, index, budget=b) for b in budgets}
    yield "ours, cells, tuned", tuned, seconds, ""
    yield "ours, exact", {"exact": partial(_ours, index, exact=True)}, seconds, "proved"
    del index, tuned
    yield from _peers(table)


def _built(make: Callable[[], Any]) -> tuple[Any, float]:
    """What ``make`` makes, and the seconds it took."""
    started = time.perf_counter()
    return make(), time.perf_counter() - started


def _ours(index: TokenIndex, q: np.ndarray, **how: Any) -> np.ndarray:
    return index.query(q, K, **how).ids


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
        index, seconds = _built(lambda make=make: _filled(make(), table))  # type: ignore[misc]
        yield name, _settings(index, name), seconds, ""
        del index


def _filled(index: Any, table: np.ndarray) -> Any:
    index.train(table)
    index.add(table)
    return index


def _ivf(faiss: Any, D: int, lists: int) -> Any:
    index = faiss.index_factory(D, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = 64, 1
    index.cp.niter = 6
    return index


def _settings(index: Any, name: str) -> dict[str, Ask]:
    """How to ask ``index`` with less and more effort."""

    efforts, owner = {
        "faiss IVF": (("nprobe", (4, 8, 16, 32, 64, 128, 256)), index),
        "faiss HNSW": (("efSearch", (16, 32, 64, 128, 256, 512)), getattr(index, "hnsw", None)),
    }.get(name, (("", ()), None))

    def ask(value: int, q: np.ndarray) -> np.ndarray:
        if owner is not None:
            setattr(owner, efforts[0], value)
        return np.asarray(index.search(q, K)[1])

    if owner is None:
        return {"": partial(ask, 0)}
    return {f"{efforts[0]}={value}": partial(ask, value) for value in efforts[1]}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
