"""``cllm bench lookup``: the token index against the exact matrix product and faiss, one thread each.

It is measured in parts, each kept in the user's cache as soon as it is done: a bench that ``--minutes``
stopped goes on where it was when it is called again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cllm.bench.harness import Claim, Options, Result, load_now
from cllm.bench.lookup_contestant import OURS, PRODUCT
from cllm.bench.lookup_parts import Parts
from cllm.bench.lookup_peers import PEERS, has_faiss
from cllm.bench.lookup_proof import PROVED

TAKES = frozenset({"data", "minutes"})
SIZES, WIDTHS = (4096, 32_768, 262_144, 1_000_000), (64, 128)
ROUNDS = 5
QUIET = 0.1
"""Processors' worth of others' work beside a part, above which the results say that it was not alone."""
UNMEASURED = "not all of it is measured yet: call the bench again"
NOTES = [
    "k = 10, by inner products; `l2` and `cosine` beside the matrix product with what these metrics make of"
    " it, and its top ten. Made tables: V/64 clusters of Zipf sizes, variances 1/i in the i-th"
    " principal direction, 36% of them within clusters, lengths times exp(0.2·normal); queries are rows"
    " with noise of half their length (`bench/lookup_tables.py`). A trained table is the output head of"
    " the run that `--data RUN` names, with hidden vectors of its validation split.",
    "One thread each. `of 128`: 128 queries in one call; the matrix product takes 64 at a time. Times are"
    f" medians of {ROUNDS} rounds in turns with the matrix product; `× product` is its time over the"
    " method's. `setting` is the first that finds 95% of the ten on other queries, or the last tried."
    " `build s` is processor time.",
    "The fastest exact scan is the matrix product, our plain scan or faiss Flat, each by its time beside"
    " the matrix product's. IVF has 4√V lists, trained in 6 rounds on at most 64 rows a list; HNSW has"
    " M = 16.",
]


def run(options: Options) -> Result:
    """Every table in a process of its own; ``quick`` takes a small table, measures in this
    process, keeps nothing and judges nothing."""
    load = load_now()
    parts = Parts(
        rounds=1 if options.quick else ROUNDS, minutes=options.minutes, here=options.quick
    )
    sizes, widths = ((1024,), (16,)) if options.quick else (SIZES, WIDTHS)
    tables: list[dict[str, Any]] = [{"run": path} for path in options.data]
    tables += [{"V": V, "D": D} for V in sizes for D in widths]
    methods = (PRODUCT, *OURS, *(PEERS if has_faiss() else ()))
    found = [row for table in tables for row in parts.rows(table, methods)]
    proofs = [_exact_claim(parts, metric, options.quick) for metric in PROVED]
    claims = [claim for D in widths for claim in _speed_claims(found, max(sizes), D)] + proofs
    if options.quick:
        claims = [replace(claim, judged=False, why="--quick") for claim in claims]
    others = [others for row in found if (others := row.pop("others")) is not None]
    return Result(
        bench="lookup",
        rows=found,
        claims=claims,
        notes=[*NOTES, *_what_is_missing(parts)],
        packages=("numpy", "torch", "faiss-cpu"),
        load_before=load,
        busy=_busy(others),
    )


def _what_is_missing(parts: Parts) -> list[str]:
    notes = []
    if parts.missing:
        notes.append(f"Not measured for want of time: {', '.join(parts.missing)}.")
    if not has_faiss():
        notes.append("faiss is not installed (pip install 'cllm[bench]'): its rows are missing.")
    return notes


def _busy(others: list[float]) -> str:
    """What other programs did meanwhile, if that was worth a word."""
    beside = sum(share > QUIET for share in others)
    if not beside:
        return ""
    return (
        f"beside {beside} of {len(others)} parts others used more than {QUIET} of a processor, at most"
        f" {max(others):.1f}"
    )


def _speed_claims(rows: list[dict[str, Any]], V: int, D: int) -> list[Claim]:
    """Of the made table (V, D): what is found, and the speed over the fastest exact scan of the table."""
    here = {r["method"]: r for r in rows if (r["table"], r["V"], r["D"]) == ("clustered", V, D)}
    ours = here.get("ours, cells")
    names = [PRODUCT, "ours, plain scan"] + (["faiss Flat"] if has_faiss() else [])
    scans = [here[name] for name in names if name in here]
    whole = ours is not None and len(scans) == len(names)
    case = f"V={V:,}, D={D}"
    found = [
        Claim(
            name=f"recall@10, {case}",
            value=ours["recall@10"] if ours is not None else None,
            required=0.95,
            why="" if ours is not None else UNMEASURED,
        )
    ]
    for name, key in (("one query", "× product, one"), ("128 queries", "× product, 128")):
        speed = None
        if ours is not None and whole:
            speed = ours[key] / max(scan[key] for scan in scans)
        found.append(
            Claim(
                name=f"times the speed of the fastest exact scan, {name}, {case}",
                value=speed,
                required=5.0,
                why="" if whole else UNMEASURED,
            )
        )
    return found


def _exact_claim(parts: Parts, metric: str, quick: bool) -> Claim:
    """Queries that ``exact=True`` answers otherwise than a scan in float64 does."""
    V, D = (512, 16) if quick else (32_768, 64)
    count = 100 if quick else PROVED[metric]
    wrong = parts.proof({"metric": metric, "count": count, "V": V, "D": D})
    return Claim(
        name=f"exact=True unlike brute force, {metric}, of {count:,} queries, V={V:,}, D={D}",
        value=wrong,
        required=0.0,
        higher_is_better=False,
        why="" if wrong is not None else UNMEASURED,
    )
