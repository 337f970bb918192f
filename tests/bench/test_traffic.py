"""What processes send is counted and put beside the forecast: parts of ``cllm bench parallel``."""

from __future__ import annotations

import socket
import struct
import sys

import pytest

from cllm.bench import sockets, traffic
from cllm.bench.traffic_contestant import communication
from cllm.core.errors import UserError
from cllm.training.plan.estimate import Estimate

FORETOLD = Estimate(
    strategy="DDP", kind="ddp", devices=2, compute=0.3, communication=0.012, sent=4e6
)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_what_a_process_sends_is_counted_and_what_it_receives_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        with one, other:
            one.sendall(b"before")
            before = sockets.sent_so_far()
            one.sendall(bytes(70_000))
            left = 70_006
            while left:
                left -= len(other.recv(left))
            assert sockets.sent_since(before) == 70_000
            other.sendall(b"back")
            assert sockets.sent_since(before) == 70_004
            later = socket.create_connection(server.getsockname())
            with later:
                later.sendall(b"new")
                assert sockets.sent_since(before) == 70_007


def test_what_was_sent_again_counts_once() -> None:
    info = bytes(200) + struct.pack("<QQ", 5000, 1200)
    assert sockets.parse(info) == 3800
    with pytest.raises(UserError, match=r"since 4\.19"):
        sockets.parse(info[:-1])


def test_waiting_for_another_process_is_not_sending() -> None:
    """Nanoseconds: in the second collective the first process waits 400 for the other."""
    first = [(0, 100), (1000, 1500), (2000, 2080), (3000, 3050)]
    second = [(20, 90), (1400, 1490), (1990, 2090), (2990, 3055)]
    found = communication([first, second], steps=2)
    assert found == [
        [pytest.approx(80e-9), pytest.approx(100e-9)],
        [pytest.approx(90e-9), pytest.approx(55e-9)],
    ]
    with pytest.raises(AssertionError):
        communication([first[:3], second[:3]], steps=2)


def test_a_step_sends_as_long_as_its_collectives_take_at_their_medians() -> None:
    rounds = [
        {"sent": 5e6, "seconds": 0.4, "collectives": [[0.004, 0.006], [0.9, 0.006]]},
        {"sent": 5e6, "seconds": 0.3, "collectives": [[0.004, 0.7]]},
        {"sent": 5e6, "seconds": 0.2, "collectives": []},
    ]
    rows = {row["contestant"]: row for row in traffic.compare("DDP, a", "DDP", rounds, FORETOLD)}
    assert rows[f"DDP, a: {traffic.SENT}"]["measured"] == 5
    assert rows[f"DDP, a: {traffic.SENT}"]["forecast ÷ measured"] == 0.8
    assert rows[f"DDP, a: {traffic.SENDING}"]["measured"] == 10
    assert rows[f"DDP, a: {traffic.SENDING}"]["forecast ÷ measured"] == 1.2
    assert rows[f"DDP, a: {traffic.STEP}"]["forecast"] == 312
    stages = traffic.compare("stages, a", "stages", rounds, FORETOLD)
    assert all(traffic.SENDING not in row["contestant"] for row in stages)


@pytest.mark.parametrize(
    ("sent", "sending", "step", "holds"),
    [
        (1.01, 0.75, 1.29, (True, True, True)),
        (1.31, 1.2, 0.69, (False, True, False)),
        (0.9, 0.6, 1.0, (True, False, True)),
    ],
)
def test_the_worst_forecast_is_judged(
    sent: float, sending: float, step: float, holds: tuple[bool, ...]
) -> None:
    rows = [
        {"contestant": f"{name}, a: {what}", "forecast ÷ measured": ratio}
        for name in ("DDP", "FSDP")
        for what, ratio in (
            (traffic.SENT, sent if name == "FSDP" else 1.0),
            (traffic.SENDING, sending if name == "FSDP" else 1.0),
            (traffic.STEP, step if name == "FSDP" else 1.0),
        )
    ]
    claims = traffic.claims_of(rows, "", "")
    assert tuple(claim.holds for claim in claims) == holds
    assert [claim.required for claim in claims] == [0.3, 0.3, 0.3]
    busy = traffic.claims_of(rows, "", "others are at work")
    assert [claim.holds for claim in busy] == [holds[0], None, None]
    quick = traffic.claims_of(rows, "--quick", "")
    assert all(claim.holds is None and claim.why for claim in quick)
