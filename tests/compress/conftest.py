"""Problems that several decoders are tried on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

Made = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="session")  # hypothesis takes none of a function's
def made() -> Made:
    """Weights (m, n) and a metric (n, n) of correlated inputs, of some ``kind``."""
    return _made


def _made(
    m: int = 12, n: int = 40, seed: int = 0, kind: str = "usual"
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(m, n)) * 0.1
    X = rng.normal(size=(4 * n + 3, n)) @ (np.eye(n) + rng.normal(size=(n, n)) * 0.3)
    X = X * np.geomspace(2, 0.5, n)
    if kind == "zero rows":
        W[::2] = 0
    elif kind == "constant rows":
        W[:] = np.linspace(-1, 1, m)[:, None]
    elif kind == "dead inputs":
        X[:, :: max(2, n // 3)] = 0
    elif kind == "rank deficient":
        X = X[: max(1, n // 2)]
    elif kind == "huge condition":
        X = X * np.geomspace(1e8, 1e-8, n)
    elif kind == "zero metric":
        X = X * 0
    return torch.from_numpy(W), torch.from_numpy(X.T @ X)
