"""Resolved configurations that need no measurement of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cllm.core.config import Config
from cllm.training.plan.machines import Devices
from cllm.training.plan.network import Network
from cllm.training.plan.roofline import Rates

RESOLVED: dict[str, Any] = {
    "model__vocab_size": 300,
    "train__dtype": "fp32",
    "train__attention": "matmul",
    "train__loss_chunk": 0,
    "train__lazy_rows": "off",
    "train__device": "cpu",
    "train__threads": 1,
}


@pytest.fixture(scope="session")
def resolved(config_of: Callable[..., Config]) -> Callable[..., Config]:
    """Makes a resolved configuration, some settings changed."""
    return lambda **changes: config_of(**RESOLVED | changes)


@pytest.fixture(scope="session")
def answer_of() -> Callable[..., list[dict[str, Any]]]:
    """What measuring processes would answer to a request; made up, and slower the more they are."""

    def answer(
        request: dict[str, Any], processes: int = 1, program: str = ""
    ) -> list[dict[str, Any]]:
        if "link" in program:
            table = [[64, 1e-5], [10**6, 1e-3]]
            return [dict.fromkeys(("exchange", "all_reduce", "all_gather"), table)] * processes
        rate = 1e9 / processes
        found: dict[str, Any] = {"products": [rate + n for n, _ in enumerate(request["products"])]}
        if request["constants"]:
            found |= {"call": 1e-6, "light": 0.0, "strided": 0.0, "heavy": 1e-9}
            found |= {"stream": [[1e6, 1e10]], "base_memory": 5, "hand_over": 1e-5}
            found |= {"reference": 0.5 * processes}
        return [found] * processes

    return answer


@pytest.fixture(scope="session")
def devices_with() -> Callable[..., Devices]:
    """Makes ``count`` devices of 10¹² operations and 10¹¹ bytes a second, some figures changed."""

    def make(count: int, **changes: Any) -> Devices:
        rates = Rates(flops=1e12, stream=[(1.0, 1e11)], products={})
        figures = {"memory": 1e11, "link": 1e9, "latency": 1e-6} | changes
        network = Network(count=count, link=figures.pop("link"), latency=figures.pop("latency"))
        return Devices(name="made up", rates=rates, network=network, **figures)

    return make
