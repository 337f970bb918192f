"""Random Hadamard rotation: orthogonal, undone exactly enough, the metric's distances kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard as reference

from cllm.compress.rotation import Rotation, hadamard, rotation_of, stored_rotation


@pytest.mark.parametrize(("n", "block"), [(64, 64), (96, 32), (7, 1)])
def test_it_is_the_walsh_hadamard_transform_in_blocks(n: int, block: int) -> None:
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H = torch.from_numpy(reference(block)).double() / block**0.5
    assert torch.allclose(hadamard(x), (x.view(3, -1, block) @ H).view(3, n))


@given(m=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_distances_under_the_metric_are_kept_and_weights_come_back(
    m: int, n: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    W, X = (torch.randn(k, n, dtype=torch.float64, generator=generator) for k in (m, 50))
    rotation, H = Rotation(seed=seed, rows=m, columns=n), X.T @ X
    turned = rotation.apply(W)
    assert torch.allclose(rotation.undo(turned), W)
    size = ((W @ H) * W).sum()
    assert torch.allclose(((turned @ rotation.metric(H)) * turned).sum(), size)


def test_an_outlier_is_spread() -> None:
    W = torch.zeros(64, 128)
    W[3, 5] = 1.0
    turned = Rotation(seed=1, rows=64, columns=128).apply(W)
    assert torch.allclose(turned.abs(), torch.full_like(W, (64 * 128) ** -0.5))
    full = torch.ones(64, 128)
    made = [Rotation(seed=seed, rows=64, columns=128).apply(full) for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_what_a_file_says_of_it() -> None:
    made = rotation_of("hadamard", "layers.0.mlp.out", (4, 8))
    assert made is not None
    assert stored_rotation(made.facts(), (4, 8)) == made
    assert rotation_of("none", "x", (4, 8)) is None
    assert stored_rotation({}, (4, 8)) is None
    with pytest.raises(ValueError, match="none or hadamard, not 'givens'"):
        rotation_of("givens", "x", (4, 8))
