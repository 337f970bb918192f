"""The decoding loop as one C++ library (decode.cpp), compiled once for a machine by ``cllm compile``.

It knows the models that most runs are: float32, RMSNorm, SwiGLU, rotary positions. Several tokens are
written in one call, drawing included, so that neither Python nor a dispatcher stands between them; where
one step takes a quarter of a millisecond that was measured to be half of the time. Nothing here needs
torch, whose import takes longer than all else before the first token.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cllm.core.errors import UserError
from cllm.core.model_config import ModelConfig
from cllm.infer.request import Sampling

if TYPE_CHECKING:
    from cllm.lattice.native import Library

SOURCE = Path(__file__).with_name("decode.cpp")
PANEL, ROWS = 16, 64
"""Rows of a panel of a matrix, and rows that go through the layers together."""
TRIALS = 12
OPTIONS = ("-std=gnu++17", "-pthread")


class _Shape(ctypes.Structure):
    """decode.cpp's ``Shape``."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("layers", "width", "heads", "groups", "head", "hidden", "vocab"),
                *("slots", "capacity", "rows", "threads"),
            )
        ),
        ("eps", ctypes.c_float),
        *(
            (name, ctypes.c_void_p)
            for name in ("table", "gain", "scores", "cos", "sin", "weights", "caches", "logits")
        ),
    ]


class _Draw(ctypes.Structure):
    """decode.cpp's ``Draw``."""

    _fields_ = [
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("top_k", ctypes.c_int64),
    ]


def library() -> Library:
    """The library, compiled or not."""
    made: Library = _native().Library(source=SOURCE, options=OPTIONS)
    return made


def _native() -> Any:
    """``cllm.lattice.native`` without its package, which stands on its own and imports torch."""
    name = "cllm.lattice.native"
    if name not in sys.modules:
        place = Path(__file__).parent.parent / "lattice" / "native.py"
        spec = importlib.util.spec_from_file_location(name, place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # as any import does, before the code runs
        spec.loader.exec_module(module)
    return sys.modules[name]


def compile_library() -> Path:
    """Compile the library, if it is not there; takes some seconds.

    Raises ``UserError`` where it cannot be compiled (no C++ compiler, Windows).
    """
    try:
        return library().compile()
    except _native().CannotCompileError as error:
        raise UserError(f"the decoding library cannot be compiled: {error}") from error


def unknown_shape(config: ModelConfig) -> str:
    """Why the library does not know a model of this shape; empty if it does."""
    widths = {
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "the rows of queries, keys and values": (config.n_heads + 2 * config.kv_heads)
        * config.head_dim,
    }
    wanted = {
        f"model.norm {config.norm}": config.norm == "rmsnorm",
        f"model.mlp {config.mlp}": config.mlp == "swiglu",
        f"positions {config.positions}": config.positions == "rope",
        f"heads of {config.head_dim} numbers": config.head_dim % 16 == 0,
    } | {f"{name} of {size}": size % PANEL == 0 for name, size in widths.items()}
    return next((name for name, holds in wanted.items() if not holds), "")


@dataclass(frozen=True, eq=False)
class LoopWeights:
    """What the loop multiplies with, all float32; scales of norms are folded into what follows them.

    ``table`` (V, D) is looked up, ``scores`` (V, D) gives the logits of hidden vectors times ``gain``
    (D,). ``cos`` and ``sin`` (context, K). ``layers``: of each queries, keys and values together, out,
    gate, up and down, each (rows, columns).
    """

    table: np.ndarray
    scores: np.ndarray
    gain: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    layers: Sequence[Sequence[np.ndarray]]


class Loop:
    """A model in the library's memory. Raises ``OSError`` where that or threads are refused.

    ``caches``: keys and values of each layer in turn, (slots, groups, capacity, K) float32, which may be
    another's and are written. ``most``: threads that there are. ``threads``: those that a call uses.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        weights: LoopWeights,
        caches: Sequence[np.ndarray],
        most: int,
    ) -> None:
        assert not unknown_shape(config)
        self._library = ctypes.CDLL(str(path))
        self._library.cllm_open.restype = ctypes.c_void_p
        for name in ("cllm_read", "cllm_write", "cllm_draw"):
            getattr(self._library, name).restype = ctypes.c_int64
        self.threads = self._most = most
        self.slots, _, self.capacity, _ = caches[0].shape
        self._vocab = len(weights.table)
        padded = -(-self._vocab // PANEL) * PANEL
        rows = max(ROWS, self.slots)
        self._logits = np.zeros((rows, padded), np.float32)
        matrices = [self._packed(matrix) for layer in weights.layers for matrix in layer]
        fixed = {
            "table": _plain(weights.table),
            "gain": _plain(weights.gain),
            "scores": self._packed(weights.scores),
            "cos": _plain(weights.cos),
            "sin": _plain(weights.sin),
            "logits": self._logits,
        }
        for cache in caches:
            assert cache.dtype == np.float32
            assert cache.flags.c_contiguous
        self._held: list[Any] = [
            fixed,
            matrices,
            list(caches),
            _pointers(matrices),
            _pointers(caches),
        ]
        shape = _Shape(
            layers=config.n_layers,
            width=config.d_model,
            heads=config.n_heads,
            groups=config.kv_heads,
            head=config.head_dim,
            hidden=config.d_ff,
            vocab=self._vocab,
            slots=self.slots,
            capacity=self.capacity,
            rows=rows,
            threads=most,
            eps=config.norm_eps,
            weights=ctypes.addressof(self._held[3]),
            caches=ctypes.addressof(self._held[4]),
            **{name: array.ctypes.data for name, array in fixed.items()},
        )
        opened = self._library.cllm_open(ctypes.byref(shape))
        if opened is None:
            raise OSError(f"no memory, or no {most} threads, for it")
        self._handle = ctypes.c_void_p(opened)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.cllm_close(self._handle)

    def read(self, slot: int, ids: Sequence[int]) -> tuple[np.ndarray, int, bool]:
        """Read a text into a slot from position 0: logits (1, V), the likeliest, and whether all of them
        are finite."""
        n = len(ids)
        self._check(ids, [slot], n)
        numbers = ctypes.c_int64 * n
        best = ctypes.c_int64()
        damaged = self._library.cllm_read(
            self._handle,
            ctypes.c_int64(self.threads if n > 1 else 1),
            ctypes.c_int64(n),
            numbers(*ids),
            numbers(*([slot] * n)),
            numbers(*range(n)),
            ctypes.byref(best),
        )
        return self._logits[:1, : self._vocab].copy(), best.value, not damaged

    def draw(self, how: Sampling, uniform: float) -> int:
        """A token by the logits of the last ``read``, drawn at ``uniform``."""
        drawn: int = self._library.cllm_draw(
            self._handle, ctypes.byref(_as_draw(how)), ctypes.c_double(uniform)
        )
        return drawn

    def write(
        self,
        tokens: dict[int, int],
        places: Sequence[int],
        steps: int = 1,
        draws: Sequence[Sampling] | None = None,
        uniforms: Sequence[float] = (),
        end_id: int | None = None,
    ) -> tuple[list[list[int]], np.ndarray, bool]:
        """Append a token to each slot in ``tokens`` at its place, and go on for ``steps``.

        ``draws`` for each slot in order (none: the likeliest), ``uniforms`` step by step. Returns for each
        slot the tokens that follow, up to ``end_id`` where it comes; logits (n, V) of the last step, which
        the next call overwrites and which are by slot while none has ended; and whether all were finite.
        """
        n = len(tokens)
        self._check(tokens.values(), tokens, max(places) + steps)
        assert len(places) == n
        assert draws is None or (len(draws) == n and len(uniforms) == n * steps)
        numbers, out = ctypes.c_int64 * n, (ctypes.c_int64 * (n * steps))()
        chosen = None
        if draws is not None:
            chosen = (_Draw * n)(*map(_as_draw, draws))
        damaged = self._library.cllm_write(
            self._handle,
            ctypes.c_int64(self.threads),
            ctypes.c_int64(steps),
            ctypes.c_int64(n),
            numbers(*tokens),
            numbers(*tokens.values()),
            numbers(*places),
            chosen,
            (ctypes.c_double * len(uniforms))(*uniforms),
            ctypes.c_int64(-1 if end_id is None else end_id),
            out,
        )
        made = [[token for token in out[row::n] if token >= 0] for row in range(n)]
        return made, self._logits[:n, : self._vocab], not damaged

    def choose_threads(self) -> str:
        """Take one thread or all, whichever is measured to be faster for a step; the cache is written."""
        found = {}
        for threads in sorted({1, self._most}):
            self.threads = threads
            times = []
            for _ in range(TRIALS):
                begin = time.perf_counter()
                self.write(dict.fromkeys(range(self.slots), 0), [0] * self.slots)
                times.append(time.perf_counter() - begin)
            found[threads] = sorted(times[2:])[len(times[2:]) // 2]
        self.threads = min(found, key=lambda threads: found[threads])
        figures = ", ".join(f"{n}: {1e3 * s:.2f} ms" for n, s in found.items())
        count = "one thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{count} (a step with {figures})"

    def _check(self, ids: Any, slots: Any, end: int) -> None:
        """The library looks at no bounds: what would lie outside is refused here (``IndexError``)."""
        if not (min(ids) >= 0 and max(ids) < self._vocab):
            raise IndexError(f"a token is not in 0…{self._vocab - 1}")
        if not (min(slots) >= 0 and max(slots) < self.slots and 0 < end <= self.capacity):
            raise IndexError(f"{self.slots} slots of {self.capacity} tokens do not hold this")

    def _packed(self, matrix: np.ndarray) -> np.ndarray:
        rows, width = matrix.shape
        made = np.empty(-(-rows // PANEL) * PANEL * width, np.float32)
        matrix = _plain(matrix)
        self._library.cllm_pack(
            ctypes.c_void_p(matrix.ctypes.data),
            ctypes.c_int64(rows),
            ctypes.c_int64(width),
            ctypes.c_void_p(made.ctypes.data),
        )
        return made


def _plain(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


def _pointers(arrays: Sequence[np.ndarray]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


def _as_draw(how: Sampling) -> _Draw:
    # More than any vocabulary is as good, and ctypes would cut off what exceeds 64 bits.
    return _Draw(how.temperature, how.top_p, how.min_p, min(how.top_k, 2**31 - 1))
