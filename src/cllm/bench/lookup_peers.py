"""faiss's indexes for the bench of look-ups, and how an index that takes minutes is built in pieces."""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cllm.core.atomic import new_directory

Ask = Callable[[np.ndarray], np.ndarray]
K = 10
PEERS = ("faiss Flat", "faiss SQ8", "faiss IVF", "faiss HNSW")
STEP = 1 << 14
"""Rows added between two looks at the clock."""


def has_faiss() -> bool:
    """Whether the peers can be measured."""
    return importlib.util.find_spec("faiss") is not None


class Building:
    """An index that is filled a piece at a time and kept in a directory when the time is over.

    ``seconds`` is the processor time that it has taken so far, all pieces together.
    """

    def __init__(self, name: str, table: np.ndarray, place: Path) -> None:
        self.table, self.place, self.seconds = table, place, 0.0
        self.faiss = importlib.import_module("faiss")
        self.faiss.omp_set_num_threads(1)
        if place.is_dir():
            self.index = self.faiss.read_index(str(place / "index"))
            self.seconds = json.loads((place / "state.json").read_text(encoding="utf-8"))["seconds"]
        else:
            self.index = self._empty(name)

    @property
    def is_whole(self) -> bool:
        """Whether all rows are in it."""
        return bool(self.index.ntotal == len(self.table))

    def go_on(self, until: float) -> None:
        """Train and add rows until it is whole or the monotonic clock says ``until``; one step at least."""
        while not self.is_whole:
            started = time.process_time()
            if not self.index.is_trained:
                self.index.train(self.table)
            else:
                done = self.index.ntotal
                self.index.add(self.table[done : done + STEP])
            self.seconds += time.process_time() - started
            if time.monotonic() > until:
                break

    def keep(self) -> None:
        """Write what there is, whole or not at all."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        with new_directory(self.place) as directory:
            self.faiss.write_index(self.index, str(directory / "index"))
            state = json.dumps({"seconds": self.seconds})
            (directory / "state.json").write_text(state, encoding="utf-8")

    def _empty(self, name: str) -> Any:
        faiss, (V, D) = self.faiss, self.table.shape
        inner = faiss.METRIC_INNER_PRODUCT
        if name == "faiss Flat":
            return faiss.IndexFlatIP(D)
        if name == "faiss SQ8":
            return faiss.IndexScalarQuantizer(D, faiss.ScalarQuantizer.QT_8bit, inner)
        if name == "faiss HNSW":
            return faiss.IndexHNSWFlat(D, 16, inner)
        index = faiss.index_factory(D, f"IVF{max(4 * round(V**0.5), 16)},Flat", inner)
        index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = 64, 1
        index.cp.niter = 6
        return index


def settings(index: Any, name: str) -> dict[str, Ask]:
    """How to ask a faiss index with less and more effort, the least first."""
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
