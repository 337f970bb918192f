"""Other people's rounding of the same layers: HQQ, torchao and llama.cpp's k-quants, where they install."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cllm.compress.calibration import layers_in_order
from cllm.compress.source import Source

GROUP = 128
"""Columns that share a scale, as in ours."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """The layers as a peer rounds them: dense ``weights`` by parameter name, ``bits`` a weight with scales
    and all else, and a ``note`` where something has to be said."""

    weights: dict[str, Tensor]
    bits: float
    note: str = ""


def hqq(source: Source, bits: int) -> Rounded:
    """Half-quadratic quantization (Badri & Shaji 2023), which looks at no text; scale and zero in fp16.

    Raises ``ImportError`` without the package ``hqq``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantizer = import_module("hqq.core.quantize").Quantizer

    def one(weight: Tensor) -> Tensor:
        kind = {"device": "cpu", "compute_dtype": torch.float16}
        packed, facts = quantizer.quantize(weight, nbits=bits, group_size=GROUP, axis=1, **kind)
        values: Tensor = quantizer.dequantize(packed, facts)
        return values.float()

    return Rounded(_each(source, one), bits + 32 / GROUP)


def torchao(source: Source, bits: int) -> Rounded:
    """``IntxWeightOnlyConfig``: to the nearest, by the range of each group; scale in fp16, zero in int8.

    Raises ``ImportError`` without the package ``torchao``, and ``RuntimeError`` for rows that are no whole
    groups, which it does not take.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = import_module("torchao.quantization")
        granularity = import_module("torchao.quantization.granularity")
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=granularity.PerGroup(GROUP),
        mapping_type=quantization.MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
    )

    def one(weight: Tensor) -> Tensor:
        if weight.shape[1] % GROUP:
            raise RuntimeError(f"rows of {weight.shape[1]} are no whole groups of {GROUP}")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data.copy_(weight)
        whole = nn.Sequential(layer)
        quantization.quantize_(whole, config)
        rounded: Tensor = whole.get_parameter("0.weight").dequantize()
        return rounded.float()

    return Rounded(_each(source, one), bits + 24 / GROUP)


def k_quants(source: Source, bits: int) -> Rounded:
    """llama.cpp's own quantizer on the run exported to GGUF: ``Q2_K``, ``Q3_K_S``, ``Q4_K_S``, ``Q8_0``.

    A K-block is 256 columns; rows of other lengths are stored in other types, and the note says which.
    Raises ``ImportError`` without ``llama-cpp-python`` or ``gguf``, and ``RuntimeError`` where it refuses.
    """
    llama, gguf = import_module("llama_cpp"), import_module("gguf")
    from cllm.export import gguf as exporting
    from cllm.export.source import open_source

    name = {2: "Q2_K", 3: "Q3_K_S", 4: "Q4_K_S", 8: "Q8_0"}[bits]
    with tempfile.TemporaryDirectory() as place:
        full, made = Path(place) / "full.gguf", Path(place) / "made.gguf"
        exporting.write(open_source(source.run.path), "f32", full)
        wanted = llama.llama_model_quantize_default_params()
        wanted.ftype, wanted.nthread = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{name}"), 1
        if llama.llama_model_quantize(str(full).encode(), str(made).encode(), wanted):
            raise RuntimeError(f"llama.cpp refuses to make {name}")
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(made).tensors}
        weights, size, count = _own_names(source), 0, 0
        kinds: Counter[str] = Counter()
        for theirs, ours, rows in exporting.tensors(source.config.model):
            if ours not in weights:
                continue
            tensor = stored[theirs]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            whole = weights[ours]
            picked = slice(None) if rows is None else torch.from_numpy(rows)
            whole[picked] = torch.from_numpy(values)
            size, count = size + int(tensor.n_bytes), count + values.size
            kinds[tensor.tensor_type.name] += values.size
    shares = ", ".join(f"{kind} {share / count:.0%}" for kind, share in kinds.most_common())
    return Rounded(weights, 8 * size / count, f"{name} by llama.cpp stored the layers as {shares}")


def _own_names(source: Source) -> dict[str, Tensor]:
    """Room for each layer's weight, by parameter name; what is not filled shows."""
    names = [f"{name}.weight" for name in layers_in_order(source.model())]
    return {name: torch.full_like(source.weights[name], torch.nan) for name in names}


def _each(source: Source, one: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: one(source.weights[name].float()) for name in _own_names(source)}


PEERS: dict[str, Callable[[Source, int], Rounded]] = {
    "HQQ": hqq,
    "torchao int": torchao,
    "llama.cpp": k_quants,
}
"""Name in the table to what rounds."""
