"""The compiled decoding loop (``cllm.infer.loop``) behind an engine, whose cache it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cllm.infer.cache import Cache
from cllm.infer.loop import Loop, LoopWeights, compile_library, library, unknown_shape
from cllm.infer.network import InferenceBlock, Network

if TYPE_CHECKING:
    from cllm.infer.engine import Engine

__all__ = ["Native", "compile_library", "library", "load_native", "obstacle"]


def obstacle(network: Network, options: Any) -> str:
    """Why the library does not know a model with these engine options; empty if it does."""
    wanted = {
        f"weights {options.weights}": options.weights == "fp32",
        f"a cache of {options.cache}": options.cache == "fp32",
        f"{network.table.dtype} on {network.table.device}": network.table.dtype == torch.float32
        and network.table.device.type == "cpu",
        "an index as output head": not isinstance(network.head, torch.nn.Identity),
    }
    unknown = next((name for name, holds in wanted.items() if not holds), "")
    return unknown or unknown_shape(network.config)


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


class Native(Loop):
    """The loop with an engine's weights; keys and values are the engine's.

    It knows the tokenizer's tokens alone. Where the model's table has more rows, their logits are not
    among those that it gives (``scores_all``).
    """

    def __init__(self, network: Network, cache: Cache, path: Path) -> None:
        self.scores_all = network.tokens is None
        weights = LoopWeights(
            table=_array(network.table)[: network.tokens],
            scores=_array(network.head.weight)[: network.tokens],
            gain=_array(network.gain),
            cos=_array(network.cos),
            sin=_array(network.sin),
            layers=[_matrices(layer) for layer in network.layers],
        )
        self._cache = cache  # whose memory the arrays are
        caches = [_array(buffer) for buffer in cache.buffers]
        super().__init__(path, network.config, weights, caches, torch.get_num_threads())

    def scores_of(self, slot: int, ids: Sequence[int]) -> tuple[Tensor, int, bool]:
        """``read`` with the logits as a tensor."""
        logits, best, finite = self.read(slot, ids)
        return torch.from_numpy(logits), best, finite

    def step(
        self, tokens: dict[int, int], places: Sequence[int]
    ) -> tuple[list[list[int]], Tensor, bool]:
        """``write`` of one step with the logits as a tensor."""
        made, logits, finite = self.write(tokens, places)
        return made, torch.from_numpy(logits), finite


def _matrices(layer: torch.nn.Module) -> list[np.ndarray]:
    """qkv, out, gate, up and down of a block, each (rows, columns)."""
    assert isinstance(layer, InferenceBlock)
    gate, up = np.split(_array(layer.up.matrix.weight), 2)
    return [
        _array(layer.qkv.matrix.weight),
        _array(layer.mixed.weight),
        gate,
        up,
        _array(layer.down.weight),
    ]


def _array(tensor: Tensor | torch.nn.Module) -> np.ndarray:
    assert isinstance(tensor, Tensor)
    return tensor.detach().numpy()
