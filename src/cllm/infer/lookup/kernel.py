"""The kernel of approximate queries (skim.cpp), as a function of an index."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cllm.infer.lookup.metric import Rows
from cllm.infer.lookup.regions import WHOLE, Regions
from cllm.infer.lookup.search import SKIMMED, likely_share
from cllm.lattice.native import CannotCompileError, Library

SOURCE = Path(__file__).with_name("skim.cpp")
# Sums of lanes may be vectorised; they are written so that no order of additions has to change.
OPTIONS = ("-std=c++17",)
_LOCK = threading.Lock()


class _Index(ctypes.Structure):
    """skim.cpp's ``Index``."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("cells", "width", "leading")],
        *[
            (name, ctypes.c_void_p)
            for name in (
                *("starts", "centres", "head", "tail", "vectors"),
                *("offset", "half", "inverse"),
            )
        ],
        ("distances", ctypes.c_int64),
    ]


class _Query(ctypes.Structure):
    """skim.cpp's ``Query``."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("promise", "rotated", "whole")],
        *[(name, ctypes.c_int64) for name in ("k", "wanted", "skimmed", "least")],
        ("share", ctypes.c_float),
        ("error", ctypes.c_float),
    ]


class Skim:
    """One index and metric, prepared for queries; threads may share it."""

    def __init__(self, function: Any, rows: Rows, regions: Regions, metric: str) -> None:
        self._function, self._largest = function, int(regions.sizes.max())
        self._local = threading.local()
        arrays = {
            "starts": np.ascontiguousarray(regions.starts, dtype=np.int64),
            "centres": regions.centres[WHOLE],
            "head": regions.head,
            "tail": regions.tail,
            "vectors": rows.vectors,
            "offset": regions.offset if metric == "l2" else None,
            "half": rows.half if metric == "l2" else None,
            "inverse": rows.inverse if metric == "cosine" else None,
        }
        for name, array in arrays.items():
            wanted = np.int64 if name == "starts" else np.float32
            assert array is None or (array.flags.c_contiguous and array.dtype == wanted), name
        self._arrays = arrays  # kept alive for their addresses
        self._index = _Index(
            cells=len(regions.sizes),
            width=rows.vectors.shape[1],
            leading=regions.head.shape[1],
            distances=metric == "l2",
            **{name: None if a is None else a.ctypes.data for name, a in arrays.items()},
        )

    def __call__(
        self,
        query: np.ndarray,
        rotated: np.ndarray,
        promise: np.ndarray,
        *,
        k: int,
        budget: int,
        error: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(keys, numbers) of the rows that can be among the k best of those that are looked at in full:
        ``SKIMMED`` says how many of the ``budget`` rows in the most promising cells.

        ``query`` and ``rotated`` (D,), ``promise`` (C,): float32. ``error``: of a key.
        """
        for array in (query, rotated, promise):
            assert array.flags.c_contiguous
            assert array.dtype == np.float32
        most = max(budget, k)
        keys, numbers = self._room(most + self._largest)
        asked = _Query(
            promise=promise.ctypes.data,
            rotated=rotated.ctypes.data,
            whole=query.ctypes.data,
            k=k,
            wanted=most,
            skimmed=SKIMMED,
            least=SKIMMED * k,
            share=likely_share(self._index.width - self._index.leading),
            error=error,
        )
        found = self._function(
            ctypes.byref(self._index), ctypes.byref(asked), numbers.ctypes.data, keys.ctypes.data
        )
        return keys[:found].copy(), numbers[:found].astype(np.int64)

    def _room(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Arrays that a thread keeps: the pages of new ones would cost as much as the query."""
        kept = getattr(self._local, "arrays", None)
        if kept is None or len(kept[0]) < size:
            kept = np.empty(size, dtype=np.float32), np.empty(size, dtype=np.int32)
            self._local.arrays = kept
        return kept


def load() -> Any:
    """The compiled function, or in one line why there is none."""
    with _LOCK:
        return _load()


@cache
def _load() -> Any:
    try:
        made = Library(source=SOURCE, options=OPTIONS).compile()
    except CannotCompileError as error:
        return str(error)
    function = ctypes.CDLL(str(made)).skim
    function.argtypes = [ctypes.POINTER(_Index), ctypes.POINTER(_Query), *[ctypes.c_void_p] * 2]
    function.restype = ctypes.c_int64
    return function
