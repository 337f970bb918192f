"""Chunks on several threads give what one thread gives, and leave torch's number of threads alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cllm.lattice import Leech, closest
from cllm.lattice.root import CHUNK, Dn
from cllm.lattice.threads import for_each


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("lattice", [Leech(), Dn(5)], ids=str)
def test_the_same_points(lattice: Leech | Dn, three_threads: None) -> None:
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(3 * CHUNK + 7, lattice.dimension, generator=generator)
    found = lattice.nearest(x)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    assert torch.equal(found, lattice.nearest(x))


@pytest.mark.parametrize("method", ["rounding", "nearest-plane", "k-best"])
def test_the_same_closest_vectors(method: str, three_threads: None) -> None:
    generator = torch.Generator().manual_seed(2)
    B = torch.eye(6) * 3 + torch.randn(6, 6, generator=generator)
    T = 20 * torch.randn(10_000, 6, generator=generator)
    found = closest(B, T, method=method, K=3)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    again = closest(B, T, method=method, K=3)
    assert torch.equal(found.coefficients, again.coefficients)
    assert torch.equal(found.distances, again.distances)


def test_overflow_on_a_thread_is_the_same_error(three_threads: None) -> None:
    T = torch.ones(10_000, 3)
    T[-1] = 1e9
    with pytest.raises(ValueError, match="beyond the integers"):
        closest(torch.eye(3) * 1e-3, T)


def test_what_fails_is_raised_and_the_threads_are_put_back(three_threads: None) -> None:
    def fail(start: int) -> None:
        if start == 2:
            raise ValueError("two")

    with pytest.raises(ValueError, match="two"):
        for_each(fail, range(4))
    assert torch.get_num_threads() == 3
