"""Every way to store a layer, over shapes and inputs: the file gives back, bit for bit, what was scored."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cllm.compress.calibration import Layer
from cllm.compress.formats import read_weight
from cllm.compress.layer import Piece, compress_layer
from cllm.compress.settings import Settings
from cllm.core.errors import UserError
from cllm.store.container import Container, Header, tensor_name, write_container

Made = Callable[..., tuple[torch.Tensor, torch.Tensor]]
WAYS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 2, "method": "rtn", "group": "32", "scales": "range"},
    "GPTQ": {"bits": 3, "method": "babai", "scales": "search"},
    "k-best": {"bits": 2, "beams": 3},
    "k-best rotated": {"bits": 4, "beams": 2, "rotate": "hadamard"},
    "klein": {"bits": 4, "method": "klein", "beams": 2},
    "coded": {"bits": 6, "grid": "coded", "beams": 2},
    "coded, water": {"bits": 6, "grid": "coded", "method": "babai", "columns": "water"},
    "coded E8": {"bits": 6, "grid": "coded", "lattice": "e8", "beams": 2},
    "coded Leech": {"bits": 6, "grid": "coded", "lattice": "leech", "method": "babai"},
    "E8 codebook": {"bits": 2, "grid": "e8", "method": "babai"},
    "Leech codebook": {"bits": 2, "grid": "leech", "method": "rtn", "group": "row"},
    "pruned": {"prune": "50%", "method": "fp16"},
    "pruned on a grid": {"prune": "50%", "method": "babai", "bits": 4},
}
KINDS = (
    "usual",
    "zero rows",
    "constant rows",
    "dead inputs",
    "rank deficient",
    "huge condition",
    "zero metric",
)


def layer(W: torch.Tensor, H: torch.Tensor) -> Layer:
    """A layer of these weights and metric."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(W)
    return Layer(name="one", linear=linear, fit=H, held=0.9 * H, seen=H, outer=None)


def read_back(piece: Piece) -> torch.Tensor:
    """The weight out of a file."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "a.cllm"
        header = Header(config="", source={}, method={}, weights={"one": piece.stored})
        tensors = {tensor_name("one", part): tensor for part, tensor in piece.parts.items()}
        write_container(path, header, tensors, "{}")
        return read_weight(Container.open(path), "one")


@pytest.mark.parametrize("way", WAYS)
@given(
    m=st.integers(1, 9),
    n=st.one_of(st.just(1), st.integers(2, 70)),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=10)
def test_any_layer_comes_back_bit_for_bit(
    made: Made, way: str, m: int, n: int, seed: int, kind: str
) -> None:
    if "coded" in way:
        pytest.importorskip("constriction")
    torch.set_num_threads(1)
    try:
        piece = compress_layer(layer(*made(m, n, seed, kind)), Settings(**WAYS[way]))
    except UserError as error:
        # So few numbers that what the coder says of rows and columns takes more.
        if "coded" in way and m * n < 300 and "bytes are fewer than" in str(error):
            return
        raise
    assert piece.values.shape == (m, n)
    assert bool(torch.isfinite(piece.values).all())
    assert torch.equal(read_back(piece), piece.values)
    if kind == "zero rows" and "rotated" not in way:
        assert not piece.values[::2].any()


@pytest.mark.parametrize("way", ["GPTQ", "coded", "E8 codebook", "pruned"])
@pytest.mark.parametrize("what", ["weight", "metric"])
def test_numbers_that_are_none_are_refused_in_one_line(made: Made, way: str, what: str) -> None:
    broken = layer(*made(4, 16))
    with torch.no_grad():
        (broken.linear.weight if what == "weight" else broken.fit)[0, 0] = torch.nan
    with pytest.raises((UserError, ValueError), match="NaN or infinity") as caught:
        compress_layer(broken, Settings(**WAYS[way]))
    assert "\n" not in str(caught.value)
