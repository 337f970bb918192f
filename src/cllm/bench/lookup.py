"""``cllm bench lookup``: the token index against the exact matrix product and faiss, one thread each."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np

from cllm.bench.harness import Claim, Options, Result, load_now
from cllm.bench.lookup_tables import clustered_table, noisy_rows
from cllm.core.cpu import is_busy
from cllm.core.errors import UserError

TAKES = frozenset({"data"})
SIZES, WIDTHS = (4096, 32_768, 262_144, 1_000_000), (64, 128)
PROVED = {"ip": 10_000, "l2": 1_000, "cosine": 1_000}
NOTES = [
    "Inner products, k = 10. Made tables: V/64 clusters of Zipf sizes, variances 1/i in the i-th"
    " principal direction, 36% of them within clusters, lengths times exp(0.2·normal); queries are rows"
    " with noise of half their length (`bench/lookup_tables.py`). A trained table is the output head of"
    " the run that `--data RUN` names, with hidden vectors of its validation split.",
    "One thread each. `of 128`: 128 queries in one call; the matrix product takes 64 at a time. Times are"
    " medians of rounds in turns with the matrix product; `× product` is its time over the method's."
    " `setting` is the first that finds 95% of the ten on other queries, or the last tried.",
    "IVF has 4√V lists, trained in 6 rounds on at most 64 rows a list. HNSW (M = 16) is left out above"
    " 300,000 rows to keep the bench short.",
]


def run(options: Options) -> Result:
    """All tables, each in a process of its own; ``quick`` takes small ones and judges nothing."""
    load, busy = load_now(), is_busy()
    sizes, widths = ((1024,), (16,)) if options.quick else (SIZES, WIDTHS)
    cases: list[dict[str, Any]] = [{"run": path} for path in options.data]
    cases += [{"V": V, "D": D} for V in sizes for D in widths]
    rows = [row for case in cases for row in _rows(case | {"rounds": 1 if options.quick else 3})]
    claims = _speed_claims(rows) + _exact_claims(options.quick)
    if options.quick:
        claims = [
            Claim(name=c.name, value=c.value, required=c.required, judged=False, why="--quick")
            for c in claims
        ]
    notes = list(NOTES)
    if not _has_faiss():
        notes.append("faiss is not installed (pip install 'cllm[bench]'): its rows are missing.")
    return Result(
        bench="lookup",
        rows=rows,
        claims=claims,
        notes=notes,
        packages=("numpy", "torch", "faiss-cpu"),
        load_before=load,
        busy=busy or "",
    )


def _rows(case: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    env = dict(os.environ) | dict.fromkeys(names, "1")
    done = subprocess.run(
        [sys.executable, "-m", "cllm.bench.lookup_contestant", json.dumps(case)],
        capture_output=True,
        text=True,
        env=env,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"the bench process for {case} failed: {last[0]}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _speed_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Of the largest made table of each width: against the fastest exact scan there is in the table."""
    made = [row for row in rows if row["table"] == "clustered"]
    largest = max(row["V"] for row in made)
    claims = []
    for D in sorted({row["D"] for row in made}):
        here = {r["method"]: r for r in made if r["V"] == largest and r["D"] == D}
        ours = here["ours, cells"]
        scans = [
            r for name, r in here.items() if "product" in name or "scan" in name or "Flat" in name
        ]
        case = f"V={largest:,}, D={D}"
        claims.append(Claim(name=f"recall@10, {case}", value=ours["recall@10"], required=0.95))
        for name, key in (("one query", "µs, one query"), ("128 queries", "µs, of 128")):
            claims.append(
                Claim(
                    name=f"times the speed of the fastest exact scan, {name}, {case}",
                    value=min(scan[key] for scan in scans) / ours[key],
                    required=5.0,
                )
            )
    return claims


def _exact_claims(quick: bool) -> list[Claim]:
    """Queries that ``exact=True`` answers otherwise than a scan in float64 does."""
    import torch

    from cllm.infer.lookup import TokenIndex

    V, D = (512, 16) if quick else (32_768, 64)
    table = clustered_table(V, D, seed=2)
    index = TokenIndex.build(table, plain=False)
    claims = []
    for metric, count in PROVED.items():
        queries = noisy_rows(table, 100 if quick else count, seed=3)
        found = index.query(queries, 10, metric, exact=True)
        X, Q = (torch.from_numpy(a).double() for a in (table, queries))
        wrong = 0
        for start in range(0, len(Q), 500):
            scores = _brute(X, Q[start : start + 500], metric).numpy()
            ours = found.scores[start : start + 500]
            close = np.isclose(ours, scores, rtol=1e-9, atol=1e-9).all(axis=1)
            wrong += int((~close | ~found.proved[start : start + 500]).sum())
        claims.append(
            Claim(
                name=f"exact=True unlike brute force, {metric}, of {len(Q):,} queries, V={V:,}, D={D}",
                value=float(wrong),
                required=0.0,
                higher_is_better=False,
            )
        )
    return claims


def _brute(X: Any, Q: Any, metric: str) -> Any:
    """The ten best scores in float64."""
    import torch

    if metric == "l2":
        return torch.cdist(Q, X, compute_mode="donot_use_mm_for_euclid_dist").topk(
            10, largest=False
        )[0]
    products = Q @ X.T
    if metric == "cosine":
        products /= Q.norm(dim=1, keepdim=True) * X.norm(dim=1)
    return products.topk(10, dim=1)[0]


def _has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None
