import io
import re
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from cllm.training.progress import (
    Clock,
    Lines,
    Live,
    Progress,
    Reading,
    Silent,
    amount,
    duration,
    figures,
    open_progress,
)


class FakeTime:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def live(stream: io.StringIO) -> Live:
    return Live(Console(file=stream, force_terminal=True, width=100, color_system=None))


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("kind", ["silent", "lines", "live"])
def test_all_three_do_the_same_work(kind: str) -> None:
    stream = io.StringIO()
    progress: Progress = {"silent": Silent(), "lines": Lines(stream), "live": live(stream)}[kind]
    progress.say("attention: matmul [measured]")
    with progress.stage("preparing corpus", 10) as advance:
        advance(10)
    with progress.training(3, first=1) as show:
        progress.warn("the machine is [busy]")
        with progress.stage("validating"):
            pass
        show(Reading(step=2, loss=2.5, bpb=1.25, tokens_per_second=30_500))
        show(Reading(step=3))
    assert progress.warnings == ["the machine is [busy]"]
    shown = plain(stream.getvalue())
    if kind == "silent":
        assert shown == ""
    else:
        for text in (
            "attention: matmul [measured]",
            "preparing corpus",
            "warning: the machine is [busy]",
            "validating",
            "3/3",
        ):
            assert text in shown


def test_lines_are_spaced_in_time_and_the_last_is_shown() -> None:
    stream, clock = io.StringIO(), FakeTime()
    progress = Lines(stream, every=5.0, now=clock)
    with progress.training(20) as show:
        for step in range(1, 21):
            clock.now += 1.0
            show(Reading(step=step, loss=9.0 - step / 10))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert "loss 8.400" in lines[1]
    assert "14.0 s left" in lines[1]
    assert "GiB" in lines[1]


def test_lines_tell_the_share_of_a_stage_and_how_long_it_took() -> None:
    stream, clock = io.StringIO(), FakeTime()
    with Lines(stream, every=5.0, now=clock).stage("packing", 200) as advance:
        for _ in range(4):
            clock.now += 4
            advance(50)
    assert stream.getvalue().splitlines() == [
        "packing …",
        "packing … 50%",
        "packing … 100%",
        "packing: 16.0 s",
    ]


def test_nothing_printed_during_the_bar_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    progress = live(stream)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.training(5) as show:
        for step in range(1, 6):
            print(f"printed {step}")
            progress.say(f"said {step}")
            print(f"warned {step}", file=sys.stderr)
            show(Reading(step=step))
    lines = [line.strip() for line in re.split(r"[\r\n]+", plain(stream.getvalue()))]
    for step in range(1, 6):
        assert lines.count(f"printed {step}") == 1
        assert lines.count(f"said {step}") == 1
        assert lines.count(f"warned {step}") == 1


@pytest.mark.parametrize("is_estimate", [False, True])
def test_the_bar_fits_eighty_columns(is_estimate: bool) -> None:
    stream = io.StringIO()
    progress = Live(Console(file=stream, force_terminal=True, width=80, color_system=None))
    with progress.training(100_000) as show:
        for step in (99_998, 99_999):
            show(
                Reading(
                    step=step,
                    loss=10.123,
                    bpb=2.345,
                    tokens_per_second=30_500,
                    is_estimate=is_estimate,
                )
            )
    last = plain(stream.getvalue()).replace("\r", "\n").strip().splitlines()[-1]
    assert "99999/100000" in last
    assert last.rstrip().endswith("GiB")


def test_an_error_ends_the_bar() -> None:
    stream = io.StringIO()
    progress = live(stream)
    with pytest.raises(ZeroDivisionError), progress.training(5):
        raise ZeroDivisionError
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again
    with progress.stage("next"):  # and another bar can begin
        pass


def test_time_left_forgets_the_slow_start() -> None:
    clock = FakeTime()
    left = Clock(1000, clock)
    assert left.seconds_left(0) is None
    clock.now = 60.0  # compilation
    assert left.seconds_left(1) == pytest.approx(60 * 999)
    for step in range(2, 40):
        clock.now += 0.5
        seconds = left.seconds_left(step)
    assert seconds == pytest.approx(0.5 * (1000 - 39))


def test_what_is_not_known_is_not_shown() -> None:
    assert len(figures(Reading(step=1), None)) == 1
    assert figures(Reading(step=1, loss=1.5, bpb=0.75, tokens_per_second=950), 61)[:4] == [
        "loss 1.500",
        "0.750 bpb",
        "950 tok/s",
        "1:01 left",
    ]


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (duration, 4.24, "4.2 s"),
        (duration, 59.97, "1:00"),
        (duration, 185, "3:05"),
        (duration, 7385, "2:03:05"),
        (amount, 949.6, "950"),
        (amount, 30_512, "30.5k"),
        (amount, 1_240_000, "1.24M"),
    ],
)
def test_short_texts(write: Callable[[float], str], value: float, text: str) -> None:
    assert write(value) == text


def test_the_display_fits_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(open_progress(quiet=True), Silent)
    assert isinstance(open_progress(stream=io.StringIO()), Lines)
    assert isinstance(open_progress(stream=Terminal()), Live)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_progress(stream=Terminal()), Lines)
