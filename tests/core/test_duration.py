"""Durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.core.duration import parse_duration
from cllm.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("0.5", 0.5),
        ("90s", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("1.5H", 5400),
        ("1d", 86_400),
        (" 2m ", 120),
        (90, 90),
        (2.5, 2.5),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "m", "10x", "ten", "1h30", "-5", "-5s", "10 m s", "1e3", "nan", "10m!", "--"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write 90s, 10m or 1h30m"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["0", "0s", 0, -1, float("nan"), float("inf"), "99999d"])
def test_nothing_and_forever_are_refused(text: str | float) -> None:
    with pytest.raises(UsageError, match="a duration must be"):
        parse_duration(text)


@given(st.integers(0, 48), st.integers(0, 90), st.integers(1, 90))
def test_parts_add_up(hours: int, minutes: int, seconds: int) -> None:
    assert parse_duration(f"{hours}h{minutes}m{seconds}s") == 3600 * hours + 60 * minutes + seconds
