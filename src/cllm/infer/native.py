"""The decoding loop as one C++ library (decode.cpp), compiled once for a machine by ``cllm compile``.

It knows the models that most runs are: float32, RMSNorm, SwiGLU, rotary positions. Several tokens are
written in one call, drawing included, so that neither Python nor a dispatcher stands between them; where
one step takes a quarter of a millisecond that was measured to be half of the time.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cllm.core.errors import UserError
from cllm.infer.cache import Cache
from cllm.infer.network import InferenceBlock, Network
from cllm.infer.sampling import Sampling
from cllm.lattice.native import CannotCompileError, Library

if TYPE_CHECKING:
    from cllm.infer.engine import Engine

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


def obstacle(network: Network, options: Any) -> str:
    """Why the library does not know a model with these engine options; empty if it does."""
    config = network.config
    widths = {
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "the rows of queries, keys and values": (config.n_heads + 2 * config.kv_heads)
        * config.head_dim,
    }
    wanted = {
        f"weights {options.weights}": options.weights == "fp32",
        f"a cache of {options.cache}": options.cache == "fp32",
        f"model.norm {config.norm}": config.norm == "rmsnorm",
        f"model.mlp {config.mlp}": config.mlp == "swiglu",
        f"positions {config.positions}": network.positions is None,
        f"{network.table.dtype} on {network.table.device}": network.table.dtype == torch.float32
        and network.table.device.type == "cpu",
        "an index as output head": not isinstance(network.head, torch.nn.Identity),
        f"heads of {config.head_dim} numbers": config.head_dim % 16 == 0,
    } | {f"{name} of {size}": size % PANEL == 0 for name, size in widths.items()}
    return next((name for name, holds in wanted.items() if not holds), "")


def library() -> Library:
    """The library, compiled or not."""
    return Library(source=SOURCE, options=OPTIONS)


def compile_library() -> Path:
    """Compile the library, if it is not there; takes some seconds.

    Raises ``UserError`` where it cannot be compiled (no C++ compiler, Windows).
    """
    try:
        return library().compile()
    except CannotCompileError as error:
        raise UserError(f"the decoding library cannot be compiled: {error}") from error


def load_native(engine: Engine) -> tuple[Native | None, str]:
    """The library for ``engine``, if it was compiled and knows the model, and a line that tells how it
    runs; or none, and an empty line."""
    if obstacle(engine.network, engine.options):
        return None, ""
    path = library().path()
    if not path.is_file():
        return None, ""
    try:
        made = Native(engine.network, engine.cache, path)
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded ({error}): not used"
    return made, f"compiled decoding loop, {made.choose_threads()}"


class Native:
    """A model in the library's memory; keys and values are the engine's.

    ``threads``: those that a call uses.
    """

    def __init__(self, network: Network, cache: Cache, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.cllm_open.restype = ctypes.c_void_p
        for name in ("cllm_read", "cllm_write"):
            getattr(self._library, name).restype = ctypes.c_int64
        self.threads = self._most = torch.get_num_threads()
        self._cache, config = cache, network.config
        self._vocab = network.table.shape[0]
        padded = -(-self._vocab // PANEL) * PANEL
        rows = max(ROWS, cache.slots)
        self._logits = torch.zeros(rows, padded)
        weights = [self._packed(w) for layer in network.layers for w in _matrices(layer)]
        assert isinstance(network.head.weight, Tensor)
        fixed = {
            "table": network.table.contiguous(),
            "gain": network.gain.float().contiguous(),
            "scores": self._packed(network.head.weight),
            "cos": network.cos.contiguous(),
            "sin": network.sin.contiguous(),
            "logits": self._logits,
        }
        self._held: list[Any] = [
            fixed,
            weights,
            (ctypes.c_void_p * len(weights))(*(w.data_ptr() for w in weights)),
            (ctypes.c_void_p * len(cache.buffers))(*(b.data_ptr() for b in cache.buffers)),
        ]
        shape = _Shape(
            layers=config.n_layers,
            width=config.d_model,
            heads=config.n_heads,
            groups=config.kv_heads,
            head=config.head_dim,
            hidden=config.d_ff,
            vocab=self._vocab,
            slots=cache.slots,
            capacity=cache.capacity,
            rows=rows,
            threads=self._most,
            eps=network.eps,
            weights=ctypes.addressof(self._held[2]),
            caches=ctypes.addressof(self._held[3]),
            **{name: tensor.data_ptr() for name, tensor in fixed.items()},
        )
        self._handle = ctypes.c_void_p(self._library.cllm_open(ctypes.byref(shape)))

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.cllm_close(self._handle)

    def read(self, slot: int, ids: Sequence[int]) -> tuple[Tensor, int, bool]:
        """Read a text into a slot from position 0: logits (1, V), the likeliest, and whether all of them
        are finite."""
        n = len(ids)
        numbers = ctypes.c_int64 * n
        best = ctypes.c_int64()
        damaged = self._library.cllm_read(
            self._handle,
            ctypes.c_int64(self.threads if n > 1 else 1),
            ctypes.c_int64(n),
            numbers(*ids),
            numbers(*([slot] * n)),
            numbers(*range(n)),
            ctypes.c_int64(1),
            ctypes.byref(best),
        )
        return self._logits[:1, : self._vocab].clone(), best.value, not damaged

    def write(
        self,
        tokens: dict[int, int],
        places: Sequence[int],
        steps: int = 1,
        draws: Sequence[Sampling] | None = None,
        uniforms: Sequence[float] = (),
        end_id: int | None = None,
    ) -> tuple[list[list[int]], Tensor, bool]:
        """Append a token to each slot in ``tokens`` at its place, and go on for ``steps``.

        ``draws`` for each slot in order (none: the likeliest), ``uniforms`` step by step. Returns for each
        slot the tokens that follow, up to ``end_id`` where it comes; logits (n, V) of the last step, which
        the next call overwrites and which are by slot while none has ended; and whether all were finite.
        """
        n = len(tokens)
        numbers, out = ctypes.c_int64 * n, (ctypes.c_int64 * (n * steps))()
        chosen = None
        if draws is not None:
            chosen = (_Draw * n)(*(_Draw(d.temperature, d.top_p, d.min_p, d.top_k) for d in draws))
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
        slots = range(self._cache.slots)
        found = {}
        for threads in sorted({1, self._most}):
            self.threads = threads
            times = []
            for _ in range(TRIALS):
                begin = time.perf_counter()
                self.write(dict.fromkeys(slots, 0), [0] * len(slots))
                times.append(time.perf_counter() - begin)
            found[threads] = sorted(times[2:])[len(times[2:]) // 2]
        self.threads = min(found, key=lambda threads: found[threads])
        figures = ", ".join(f"{n}: {1e3 * s:.2f} ms" for n, s in found.items())
        return f"{self.threads} threads (a step with {figures})"

    def _packed(self, weight_rd: Tensor) -> Tensor:
        rows, width = weight_rd.shape
        made = torch.empty(-(-rows // PANEL) * PANEL * width)
        weight = weight_rd.float().contiguous()
        self._library.cllm_pack(
            ctypes.c_void_p(weight.data_ptr()),
            ctypes.c_int64(rows),
            ctypes.c_int64(width),
            ctypes.c_void_p(made.data_ptr()),
        )
        return made


def _matrices(layer: torch.nn.Module) -> list[Tensor]:
    """qkv, out, gate, up and down of a block, each (rows, columns)."""
    assert isinstance(layer, InferenceBlock)
    up = layer.up.matrix.weight
    assert isinstance(up, Tensor)
    gate, up = up.chunk(2)
    return [layer.qkv.matrix.weight, layer.mixed.weight, gate, up, layer.down.weight]  # type: ignore[list-item]
