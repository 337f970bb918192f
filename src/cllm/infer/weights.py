"""Matrices as inference multiplies them: in the model's precision, in 16 bits, or in 8 or 4 as integers.

Each kind is a module with ``forward((N, D)) -> (N, R)``, both in the residual stream's precision. Products
with few rows are bound by reading the weights. In a compiled step they are written as a sum, which
Inductor turns into one loop over the stored numbers, whatever their type; outside of it torch's packed
kernels are called.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm.core.cpu import is_busy
from cllm.core.errors import UsageError, nearest
from cllm.core.measurements import recall, remember

FEW_ROWS = 4
"""Rows up to which a compiled product is written as a sum: beyond, a matrix kernel reuses the weights."""
GROUP = 32
"""Weights that share a scale and an offset where a matrix is rounded to int4."""
INT4_ROWS = 16
"""Rows that torch's int4 kernel takes together."""


def _summed(x_nd: Tensor, weight_rd: Tensor) -> Tensor:
    """x Wᵀ as a sum over D, kept as a buffer of its own."""
    return keep((x_nd[:, None, :] * weight_rd[None].to(x_nd.dtype)).sum(-1))


def keep(x: Tensor) -> Tensor:
    """``x``, which Inductor then computes once and stores, rather than anew in each loop that reads it.

    Without it the exponential of SwiGLU, say, is taken again for every output of the matrix behind it.
    """
    if not torch.compiler.is_compiling():
        return x
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def _few(x_nd: Tensor) -> bool:
    return torch.compiler.is_compiling() and x_nd.shape[0] <= FEW_ROWS


class Dense(nn.Module):
    """A matrix (R, D) of floating numbers; bf16 and fp16 round what they multiply with as well, but for
    the compiled step, whose sums are in float32."""

    weight: Tensor

    def __init__(self, weight_rd: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight_rd.to(dtype or weight_rd.dtype).contiguous())

    def forward(self, x_nd: Tensor) -> Tensor:
        """(N, D) -> (N, R)."""
        if _few(x_nd):
            return _summed(x_nd, self.weight)
        return functional.linear(x_nd.to(self.weight.dtype), self.weight).to(x_nd.dtype)


class Int8(nn.Module):
    """8-bit integers with a scale for each row; activations stay as they are.

    Four weights lie in one 32-bit number, those of columns k, k + D/4, k + D/2 and k + 3D/4. Shifts take
    them apart in whole vectors; Inductor's conversion of single bytes was measured to be several times
    slower.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, integers_rd: Tensor, scale_r: Tensor) -> None:
        super().__init__()
        rows, width = integers_rd.shape
        if width % 4:
            raise UsageError(f"int8 weights need rows of a multiple of 4 numbers, not {width}")
        together = integers_rd.view(rows, 4, width // 4).transpose(1, 2).contiguous()
        self.register_buffer("packed", together.view(rows, width).view(torch.int32))
        self.register_buffer("scale", scale_r)

    @classmethod
    def nearest(cls, weight_rd: Tensor) -> Int8:
        """Integers in −127…127, the nearest to a matrix."""
        scale = _row_scales(weight_rd)
        return cls((weight_rd / scale[:, None]).round().to(torch.int8), scale)

    def forward(self, x_nd: Tensor) -> Tensor:
        """(N, D) -> (N, R)."""
        count, width = x_nd.shape
        if _few(x_nd):
            quarters = x_nd.view(count, 4, 1, width // 4).unbind(1)
            parts = [
                x * ((self.packed << (24 - 8 * i)) >> 24).to(x.dtype)
                for i, x in enumerate(quarters)
            ]
            return keep(keep(sum(parts[1:], parts[0]).sum(-1)) * self.scale)
        x_nd = x_nd.view(count, 4, width // 4).transpose(1, 2).reshape(count, width)
        weight = self.packed.view(torch.int8)
        if x_nd.dtype == torch.float32 and x_nd.device.type == "cpu" and _packed_is_faster(count):
            return torch._weight_int8pack_mm(x_nd, weight, self.scale)
        return functional.linear(x_nd, weight.to(x_nd.dtype)) * self.scale


def _packed_is_faster(count: int) -> bool:
    """Whether torch's packed int8 kernel beats converting and multiplying here, for one row or for many.

    Measured once for a machine, torch version and number of threads: the kernel has fast paths for some
    processors only (on one with AVX2 alone it was 20 times slower).
    """
    threads, rows = torch.get_num_threads(), 1 if count <= FEW_ROWS else 64
    name = f"int8-packed-{rows}"
    known = recall(name, threads=threads) if name not in _MEASURED else _MEASURED[name]
    if known is None:
        x, scale = torch.ones(rows, 256), torch.ones(768)
        weight = torch.ones(768, 256, dtype=torch.int8)
        known = {
            "packed": _seconds(lambda: torch._weight_int8pack_mm(x, weight, scale)),
            "converted": _seconds(lambda: functional.linear(x, weight.float()) * scale),
        }
        if not is_busy(threads):
            remember(name, known, threads=threads)
    _MEASURED[name] = known
    return bool(known["packed"] < known["converted"])


_MEASURED: dict[str, dict[str, float]] = {}


def _seconds(call: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def _row_scales(weight_rd: Tensor) -> Tensor:
    """Scales (R,) that make the largest number of each row ±127."""
    return (weight_rd.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)


class Int8Dynamic(nn.Module):
    """8-bit integers with a scale for each row, multiplied with activations that are rounded to
    8 bits for each call (one scale and zero point for all of its rows, so neighbours in a batch matter)."""

    def __init__(self, integers_rd: Tensor, scale_r: Tensor) -> None:
        super().__init__()
        zeros = torch.zeros(len(scale_r), dtype=torch.long)
        with warnings.catch_warnings():
            # Deprecated in torch 2.13, and nothing in its place yet.
            warnings.simplefilter("ignore")
            made = torch._make_per_channel_quantized_tensor(integers_rd, scale_r.double(), zeros, 0)
            self.packed = torch.ops.quantized.linear_prepack(made, None)

    @classmethod
    def nearest(cls, weight_rd: Tensor) -> Int8Dynamic:
        """Integers in −127…127, the nearest to a matrix."""
        scale = _row_scales(weight_rd.float())
        return cls((weight_rd.float() / scale[:, None]).round().to(torch.int8), scale)

    def forward(self, x_nd: Tensor) -> Tensor:
        """(N, D) -> (N, R)."""
        # Without reduce_range the sums of two products overflow 16 bits on processors without VNNI.
        made: Tensor = torch.ops.quantized.linear_dynamic(
            x_nd.float(), self.packed, reduce_range=True
        )
        return made.to(x_nd.dtype)


class Int4(nn.Module):
    """Integers in −8…7 with a scale and an offset for each ``group`` weights of a row."""

    packed: Tensor
    scales: Tensor

    def __init__(
        self, integers_rd: Tensor, scale_rg: Tensor, offset_rg: Tensor, group: int
    ) -> None:
        super().__init__()
        rows, width = integers_rd.shape
        assert width % group == 0
        assert rows % INT4_ROWS == 0
        self.group = group
        steps = (integers_rd.to(torch.int32) + 8).contiguous()  # the kernel takes 8 off again
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps, 1)
        self.register_buffer("packed", packed)
        scales = torch.stack([scale_rg.T, offset_rg.T], -1)
        self.register_buffer("scales", scales.float().contiguous())

    @classmethod
    def nearest(cls, weight_rd: Tensor) -> Int4:
        """Sixteen steps from the least to the largest number of each ``GROUP``."""
        rows, width = weight_rd.shape
        if width % GROUP or rows % INT4_ROWS:
            raise UsageError(
                f"int4 weights need rows of a multiple of {GROUP} numbers and a multiple of {INT4_ROWS} "
                f"rows, and this model has a matrix of {rows} × {width}; use int8"
            )
        groups = weight_rd.float().view(rows, width // GROUP, GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp_min(torch.finfo(torch.float32).tiny)
        steps = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15) - 8
        return cls(steps.view(rows, width).to(torch.int8), scale, low + 8 * scale, GROUP)

    def forward(self, x_nd: Tensor) -> Tensor:
        """(N, D) -> (N, R)."""
        made: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_nd.float().contiguous(), self.packed, self.group, self.scales
        )
        return made.to(x_nd.dtype)


WEIGHTS = ("fp32", "bf16", "fp16", "int8", "int8-dynamic", "int4")
"""Kinds by name. ``fp32`` is the model's own precision, whichever that is."""
NOT_COMPILED = {
    "int8-dynamic": "its packed weights are no tensors, so no step is compiled with them"
}


def check_weights(kind: str) -> None:
    """Raises ``UsageError`` if there are no weights of this ``kind``."""
    if kind not in WEIGHTS:
        known = ", ".join(WEIGHTS)
        raise UsageError(f"weights {kind!r} are none of {known}{nearest(kind, WEIGHTS)}")


def pack(weight_rd: Tensor, kind: str) -> nn.Module:
    """A matrix (R, D) as weights of ``kind``.

    Raises ``UsageError`` for an unknown kind, and for a shape that int4 cannot hold.
    """
    check_weights(kind)
    weight_rd = weight_rd.detach()
    if kind == "int8":
        return Int8.nearest(weight_rd)
    if kind == "int8-dynamic":
        return Int8Dynamic.nearest(weight_rd)
    if kind == "int4":
        return Int4.nearest(weight_rd)
    return Dense(weight_rd, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind))
