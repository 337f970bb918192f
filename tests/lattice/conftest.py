"""Bases and targets that several tests use."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable

import numpy as np
import pytest


def _q_ary(n: int, q: int, seed: int) -> np.ndarray:
    """A random q-ary lattice of dimension n and determinant q^(n/2)."""
    rng = np.random.default_rng(seed)
    k = n // 2
    top = np.hstack([np.eye(n - k, dtype=np.int64), rng.integers(0, q, (n - k, k))])
    return np.vstack([top, np.hstack([np.zeros((k, n - k), np.int64), q * np.eye(k, dtype=int)])])


def _covariance(n: int, seed: int) -> np.ndarray:
    """Rows of the Cholesky factor of a sample covariance with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((4 * n, n)) * np.exp(rng.standard_normal(n))
    return np.linalg.cholesky(np.cov(samples @ rng.standard_normal((n, n)), rowvar=False))


@pytest.fixture(scope="session")
def ends() -> Callable[[str], None]:
    """Runs code in a process of its own that must end well, and soon: fplll cannot be interrupted."""

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)

    return run


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def q_ary() -> Callable[[int, int, int], np.ndarray]:
    return _q_ary


@pytest.fixture(scope="session")
def covariance() -> Callable[[int, int], np.ndarray]:
    return _covariance
