"""Whether ``exact=True`` answers as a scan in float64 does.

``python -m cllm.bench.lookup_proof '{"metric": …, "count": …, "V": …, "D": …}'`` prints the number of
queries that it answers otherwise, or without a proof.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cllm.bench.lookup_tables import clustered_table, noisy_rows
from cllm.infer.lookup import TokenIndex

PROVED = {"ip": 10_000, "l2": 10_000, "cosine": 10_000}
"""Queries compared, by metric."""
K = 10


def main(case: dict[str, Any]) -> Iterator[int]:
    """The number of queries of a made table that are answered unlike brute force."""
    torch.set_num_threads(1)
    table, metric = clustered_table(case["V"], case["D"], seed=2), case["metric"]
    queries = noisy_rows(table, case["count"], seed=3)
    found = TokenIndex.build(table, plain=False).query(queries, K, metric, exact=True)
    X, Q = (torch.from_numpy(a).double() for a in (table, queries))
    wrong = 0
    for start in range(0, len(Q), 500):
        part = slice(start, start + 500)
        scores = brute_force(X, Q[part], metric).numpy()
        close = np.isclose(found.scores[part], scores, rtol=1e-9, atol=1e-9).all(axis=1)
        wrong += int((~close | ~found.proved[part]).sum())
    yield wrong


def brute_force(X: torch.Tensor, Q: torch.Tensor, metric: str) -> torch.Tensor:
    """The ten best scores (n, 10) in float64."""
    if metric == "l2":
        distances = torch.cdist(Q, X, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.topk(K, largest=False)[0]
    products = Q @ X.T
    if metric == "cosine":
        products /= Q.norm(dim=1, keepdim=True) * X.norm(dim=1)
    return products.topk(K, dim=1)[0]


if __name__ == "__main__":
    for wrong in main(json.loads(sys.argv[1])):
        print(json.dumps(wrong), flush=True)
