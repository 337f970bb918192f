"""``cllm bench layout``: does the order of a token table's rows matter to the caches?

Batches of 2,048 rows are looked up (``index_select``) and added to (``index_add_``) on one thread, with
the rows in each order of ``cllm.text.layout``; the orders take turns at one table. Warm: batch after
batch, as fast as they go. Cold: a buffer larger than the caches is read before each batch, as the rest
of a training step does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from cllm.bench.harness import Claim, Options, Result, load_now
from cllm.bench.layout_ids import Stream, text_streams, zipf_stream
from cllm.bench.layout_misses import PAGES, cache_misses, page_misses
from cllm.core.config import TokenizerConfig
from cllm.core.cpu import is_busy
from cllm.text.layout import ORDERS, chosen_order, permutation

TAKES = frozenset({"data"})
SIZES = (4096, 32_768, 262_144, 2**20)
TEXT_SIZES = (4096, 32_768)
BATCH, WIDTH = 2048, 128
ROUNDS, BATCHES, COLD_BATCHES = 15, 32, 9
EVICT_BYTES = 64 * 2**20
WORST = 1.05
TIMES = ("gather warm", "gather cold", "scatter warm", "scatter cold")


def run(options: Options) -> Result:
    """Measure every order; ``quick`` takes one small vocabulary and judges nothing."""
    load, busy = load_now(), is_busy()
    sizes, rounds = ((1024,), 2) if options.quick else (SIZES, ROUNDS)
    texts, disorder = text_streams(options.data, TEXT_SIZES, BATCH * 4 * BATCHES, options.quick)
    streams = [zipf_stream(size, disorder, BATCH * 4 * BATCHES) for size in sizes] + texts
    with one_thread():
        rows = [row for stream in streams for row in _measure(stream, rounds)]
    quick = "quick" if options.quick else ""
    why_no_misses = quick or cache_misses(streams, rows, BATCH, WIDTH)
    why = quick or busy or ""
    claims = [replace(c, judged=not why, why=why) for c in _claims(rows)]
    notes = [
        f"Median microseconds of a batch of {BATCH:,} ids at width {WIDTH}, one thread, {rounds}"
        " interleaved rounds. `index_add_` adds to a table that is there: a training step's own"
        " sum also fills a table of zeros, whatever the order.",
        "Misses a look-up are simulated: reads of 64-byte lines by cachegrind, with a first level of 32 KiB"
        " and a second of 512 KiB (both 8-way) that begin empty, and 4-KiB pages by a warm"
        f" least-recently-used store of {PAGES:,}, as a processor's page buffer is. A row is"
        f" {WIDTH * 4 // 64} whole lines.",
        "Zipf: a token's frequency is as 1/rank. Its tokenizer order is a model: ranks whose logarithms are"
        f" disturbed by {disorder:.2f}, the deviation that byte-level BPE of {texts[0].label} has.",
    ]
    if why_no_misses:
        notes.append(f"No misses of lines: {why_no_misses}.")
    return Result(
        bench="layout",
        rows=rows,
        claims=claims,
        notes=notes,
        packages=("torch", "numpy", "tokenizers"),
        load_before=load,
        busy=busy or "",
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, and afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(stream: Stream, rounds: int) -> list[dict[str, Any]]:
    """A row of the results for each order."""
    batches = {
        order: torch.from_numpy(permutation(order, stream.counts)[stream.ids]).view(-1, BATCH)
        for order in ORDERS
    }
    # Filled, not `empty`: pages that were never written are all one page of zeros.
    table = torch.ones(stream.vocab_size, WIDTH)
    evict = torch.ones(EVICT_BYTES // 4)
    seconds: dict[str, dict[str, list[float]]] = {o: {t: [] for t in TIMES} for o in ORDERS}
    for number in range(rounds):
        for order in ORDERS if number % 2 == 0 else reversed(ORDERS):
            for name, value in _round(table, batches[order], number, evict).items():
                seconds[order][name].append(value)
    return [
        {"vocabulary": stream.vocab_size, "ids": stream.label, "order": order}
        | {name: round(median(seconds[order][name]) * 1e6, 1) for name in TIMES}
        | {"pages missed": round(page_misses(batches[order].numpy(), WIDTH * 4), 3)}
        for order in ORDERS
    ]


def _round(
    table: torch.Tensor, batches: torch.Tensor, number: int, evict: torch.Tensor
) -> dict[str, float]:
    """Seconds of a batch in each way; the round takes its own quarter of the stream."""
    rows, values = torch.empty(BATCH, WIDTH), torch.full((BATCH, WIDTH), 1e-3)
    quarter = batches[number % 4 * BATCHES :][:BATCHES]

    def gather(ids: torch.Tensor) -> None:
        torch.index_select(table, 0, ids, out=rows)

    def scatter(ids: torch.Tensor) -> None:
        table.index_add_(0, ids, values)

    found = {}
    for name, work in (("gather", gather), ("scatter", scatter)):
        # The batches before these fill the caches with this order's rows.
        for ids in batches[(number + 1) % 4 * BATCHES :][:BATCHES]:
            work(ids)
        found[f"{name} warm"] = _median_seconds(work, quarter, None)
        found[f"{name} cold"] = _median_seconds(work, quarter[:COLD_BATCHES], evict)
    return found


def _median_seconds(
    work: Callable[[torch.Tensor], None], batches: torch.Tensor, evict: torch.Tensor | None
) -> float:
    seconds = []
    for ids in batches:
        if evict is not None:
            evict.sum()
        begin = time.perf_counter()
        work(ids)
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """The default order's time over the best order's, look-up and sum together, at each vocabulary."""
    cases = list(dict.fromkeys((row["vocabulary"], row["ids"]) for row in rows))
    claims = []
    for size, ids in cases:
        default = chosen_order(TokenizerConfig().order, size)
        for state in ("warm", "cold"):
            times = {
                row["order"]: row[f"gather {state}"] + row[f"scatter {state}"]
                for row in rows
                if (row["vocabulary"], row["ids"]) == (size, ids)
            }
            claims.append(
                Claim(
                    name=f"{size:,} tokens, {ids}, {state}: time in {default} order ÷ the best order's",
                    value=round(times[default] / min(times.values()), 3),
                    required=WORST,
                    higher_is_better=False,
                )
            )
    return claims
