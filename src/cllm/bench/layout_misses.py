"""Misses of look-ups: of cache lines by valgrind's cachegrind, of pages by a count of our own.

Cachegrind simulates the caches instruction by instruction, so it needs no counters of the processor
(which virtual machines often hide) and gives the same figures each time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from cllm.bench.layout_ids import Stream
from cllm.text.layout import permutation

LEVELS = ("--I1=32768,8,64", "--D1=32768,8,64", "--LL=524288,8,64")
BATCHES = 8
PAGE_BYTES, PAGES = 4096, 2048
# One process imports numpy, which is slow under valgrind; a fork looks up each file's ids (the first is
# empty, and its misses are those of everything else).
_PROGRAM = """
import os, sys, numpy as np
batch, width = int(sys.argv[1]), int(sys.argv[2])
def aligned(rows):
    flat = np.zeros(rows * width + 16, np.float32)
    return flat[-flat.ctypes.data % 64 // 4 :][: rows * width].reshape(rows, width)
for name in sys.argv[3:]:
    child = os.fork()
    if not child:
        ids = np.load(name)
        table, out = aligned(ids[0]), aligned(batch)
        for rows in ids[1:].reshape(-1, batch):
            table.take(rows, axis=0, out=out, mode="clip")
        os._exit(0)
    os.waitpid(child, 0)
    print(child, flush=True)
"""


def page_misses(batches: np.ndarray, row_bytes: int) -> float:
    """Pages missed a look-up by a least-recently-used store of ``PAGES``, after half of ``batches``.

    ``batches`` (B, N) are rows of a table that begins at a page's edge.
    """
    held: OrderedDict[int, None] = OrderedDict()
    missed, warm = 0, batches.size // 2
    pages = (batches.reshape(-1) * row_bytes // PAGE_BYTES).tolist()
    for number, page in enumerate(pages):
        if page in held:
            held.move_to_end(page)
            continue
        missed += number >= warm
        held[page] = None
        if len(held) > PAGES:
            held.popitem(last=False)
    return missed / (len(pages) - warm)


def cache_misses(
    streams: list[Stream], rows: list[dict[str, Any]], batch: int, width: int
) -> str | None:
    """Add the lines missed a look-up to ``rows``, the first misses of a cold cache included; or say why
    they cannot be counted here."""
    valgrind = shutil.which("valgrind")
    if valgrind is None or not sys.platform.startswith("linux"):
        return "valgrind is not installed"
    by_case = {(s.vocab_size, s.label): s for s in streams}
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / "none.npy"]
        np.save(files[0], [batch])
        for number, row in enumerate(rows):
            stream = by_case[row["vocabulary"], row["ids"]]
            ids = permutation(row["order"], stream.counts)[stream.ids[: BATCHES * batch]]
            files.append(Path(place) / f"{number}.npy")
            np.save(files[-1], np.concatenate([[stream.vocab_size], ids]))
        found = _count(valgrind, files, Path(place), batch, width)
    if isinstance(found, str):
        return found
    for row, counted in zip(rows, found[1:], strict=True):
        looked = len(by_case[row["vocabulary"], row["ids"]].ids[: BATCHES * batch])
        for level, misses, others in zip((1, 2), counted, found[0], strict=True):
            row[f"lines missed, level {level}"] = round((misses - others) / looked, 2)
    return None


def _count(
    valgrind: str, files: list[Path], place: Path, batch: int, width: int
) -> list[tuple[int, int]] | str:
    """(first level, last level) misses of each process's reads, or why there are none."""
    command = [
        valgrind,
        "--tool=cachegrind",
        "--cache-sim=yes",
        *LEVELS,
        f"--cachegrind-out-file={place}/out.%p",
        *(sys.executable, "-c", _PROGRAM, str(batch), str(width)),
        *map(str, files),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    pids = done.stdout.split()
    if done.returncode or len(pids) != len(files):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return f"valgrind failed ({last[0]})"
    return [_summary(place / f"out.{pid}") for pid in pids]


def _summary(path: Path) -> tuple[int, int]:
    lines = path.read_text(encoding="utf-8").splitlines()
    names = next(line for line in lines if line.startswith("events:")).split()[1:]
    values = next(line for line in lines if line.startswith("summary:")).split()[1:]
    figures = dict(zip(names, map(int, values), strict=True))
    return figures["D1mr"], figures["DLmr"]
