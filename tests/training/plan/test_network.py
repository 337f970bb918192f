"""Bytes and seconds of sending: the model's formulas, and measured ones before them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.training.plan.network import Network

TABLE = [(64, 1e-4), (1000, 2e-4), (2000, 4e-4)]


def test_alone_nothing_is_sent() -> None:
    alone = Network(count=1, link=1e9, latency=1e-3)
    assert alone.all_reduce(1e6) == alone.all_gather(1e6) == alone.reduce_scatter(1e6) == 0
    assert alone.order(100, 2) == (0, 0)
    assert alone.summed(1e6) == alone.scattered(1e6) == 0


def test_a_large_sum_goes_round_and_a_small_one_doubles() -> None:
    eight = Network(count=8, link=1e9, latency=1e-6)
    assert eight.all_reduce(8e9) == pytest.approx(14 + 14e-6)
    assert eight.all_reduce(8) == pytest.approx(3e-6, rel=0.02)
    assert eight.all_gather(8e9) == eight.reduce_scatter(8e9) == pytest.approx(7, rel=1e-3)
    assert eight.scattered(8e9) == eight.gathered(8e9) == 7e9
    assert eight.summed(8e9) == 14e9
    assert eight.all_reduce(8e9, among=2) == pytest.approx(8, rel=1e-3)
    assert eight.all_reduce(8e9, among=1) == 0


def test_what_was_measured_goes_before_the_model() -> None:
    ways = ("exchange", "all_reduce", "all_gather")
    two = Network.of_gloo(2, dict.fromkeys(ways, TABLE))
    assert two.latency == 1e-4
    assert two.link == pytest.approx(2000 / 3e-4)
    assert two.exchange(8) == 1e-4
    assert two.all_gather(1500) == pytest.approx(3e-4)
    assert two.all_reduce(4000) == pytest.approx(8e-4)  # the last two sizes' line further on
    # Torch's gloo sums everywhere to scatter.
    assert two.reduce_scatter(4000) == two.all_reduce(4000)
    assert two.scattered(4000) == two.summed(4000) == 4000
    assert two.gathered(4000) == 2000
    # Of four, some two were not measured.
    four = Network.of_gloo(4, dict.fromkeys(ways, TABLE))
    assert four.all_reduce(4000, among=2) == pytest.approx(1e-4 + 4000 / four.link)


@given(st.lists(st.floats(1e-6, 1), min_size=4, max_size=4), st.floats(8, 1e9), st.floats(8, 1e9))
def test_more_bytes_take_no_less_time(seconds: list[float], one: float, other: float) -> None:
    """Whatever another program did to a measurement."""
    table = list(zip((64, 1000, 10**5, 10**7), seconds, strict=True))
    two = Network.of_gloo(2, {"exchange": table, "all_reduce": table, "all_gather": table})
    few, many = sorted((one, other))
    assert 0 < two.all_reduce(few) <= two.all_reduce(many) * (1 + 1e-9)
