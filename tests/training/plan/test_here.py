"""This machine is measured once, by processes that measure in step, and planned for."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm.core import measurements
from cllm.core.config import Config
from cllm.core.errors import UserError
from cllm.core.machine import machine
from cllm.training.plan import ask, calibrate, here
from cllm.training.plan.calibrate import constants, slowest
from cllm.training.plan.probe import reference
from cllm.training.plan.trace import Product
from cllm.training.plan.work import work_of

ConfigOf = Callable[..., Config]
Answer = Callable[..., list[dict[str, Any]]]


def test_constants_are_measured_once_and_not_kept_from_a_busy_machine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer_of: Answer,
) -> None:
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path))
    asked: list[dict[str, Any]] = []

    def ask(request: dict[str, Any], processes: int) -> list[dict[str, Any]]:
        asked.append(request)
        return answer_of(request, processes)

    busy: list[str | None] = [None]
    monkeypatch.setattr(calibrate, "ask", ask)
    monkeypatch.setattr(calibrate, "is_busy", lambda threads: busy[0])
    one = Product(1, 2, 3, 4, "float32", (False, True))
    other = Product(2, 2, 3, 4, "float32")
    how = {"threads": 1, "dtype": "fp32", "compiled": False}
    first = constants([one], **how).rates
    assert first.products[one] == 1e9
    assert constants([one], **how).rates == first
    assert len(asked) == 1
    busy[0] = "busy"
    assert set(constants([one, other], **how).rates.products) == {*first.products, other}
    assert asked[-1]["constants"] is False
    assert len(asked[-1]["products"]) == 1
    busy[0] = None  # what was measured meanwhile is measured again, and not mixed with what is kept
    constants([Product(3, 2, 3, 4, "float32")], **how)
    assert asked[-1]["constants"] is True
    measurements._meanwhile.clear()  # another process
    kept = constants([one], **how).rates.products
    assert other not in kept
    assert kept[one] == 1e9
    assert len(asked) == 4
    constants([], **how | {"threads": 2})
    assert asked[-1]["constants"] is True


@pytest.mark.parametrize("compiled", [False, True])
def test_forecasts_of_the_reference_are_what_it_took(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer_of: Answer
) -> None:
    """Whatever the single figures say, and beside others, who are as slow."""
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "ask", answer_of)
    config = reference(1, "fp32", compiled)
    for together, seconds in ((1, 0.5), (2, 1.0)):
        how = {"threads": 1, "dtype": "fp32", "compiled": compiled}
        work = work_of(config, constants([], **how, together=together).rates)
        whole = work.micro.of(work.layers) + work.end.of(work.layers)
        assert whole == pytest.approx(seconds, rel=1e-9)


def test_this_machine_has_threads_and_workers(
    config_of: ConfigOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer_of: Answer,
) -> None:
    two = dataclasses.replace(machine(), cores=2, quota=None, threads=2)
    monkeypatch.setattr(here, "machine", lambda: two)
    monkeypatch.setattr(calibrate, "ask", answer_of)
    monkeypatch.setattr(here, "ask", answer_of)
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path))
    told: list[str] = []
    made = here.plan_here(config_of(model__vocab_size=300), 10**6, told.append)
    by_name = {e.strategy: e for e in made.estimates}
    by_torchrun = ["DDP", "FSDP", "pipeline of 2"]
    assert list(by_name) == [
        *["one process, 1 thread", "one process, 2 threads", "2 workers"],
        *by_torchrun,
    ]
    for name, setting in zip(
        by_torchrun,
        (
            "train.parallel.strategy=ddp",
            "train.parallel.strategy=fsdp",
            "train.pipeline.mode=stages --set train.pipeline.micro_batches=4",
        ),
        strict=True,
    ):
        command = f"torchrun --nproc-per-node=2 -m cllm train --set {setting}"
        assert made.command(by_name[name]) == command
        assert by_name[name].memory.base >= 5
    assert any(line.startswith("measuring this machine once: 2 threads, fp32") for line in told)
    assert made.best is not None
    assert made.best.tokens_per_second == max(e.tokens_per_second for e in made.estimates)
    crew = made.command(by_name["2 workers"])
    assert crew == "cllm train --set train.parallel.workers=2"
    threads = made.command(by_name["one process, 2 threads"])
    assert threads == "cllm train --set train.threads=2"
    odd = here.plan_here(config_of(model__vocab_size=300, train__batch_size=3), 1, told.append)
    for estimate in odd.estimates[2:]:  # workers and all of torchrun
        assert "train.batch_size" in estimate.obstacle


def test_this_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path))
    product = Product(4, 32, 16, 32, "float32", (True, False))
    found = constants([product], threads=1, dtype="fp32", compiled=False)
    assert found.rates.products[product] > 0
    assert found.base_memory > 50e6
    assert min(found.rates.call, found.rates.heavy, found.rates.strided, found.hand_over) > 0
    assert all(rate > 0 for _, rate in found.rates.stream)
    both = constants([product], threads=1, dtype="fp32", compiled=False, together=2)
    assert both.rates.products[product] > 0
    assert both.hand_over == found.hand_over


def test_of_several_the_slowest_counts() -> None:
    quick = {"products": [3.0, 1.0], "stream": [[4, 9.0], [8, 5.0]], "call": 1e-6}
    slow = {"products": [2.0, 2.0], "stream": [[4, 8.0], [8, 6.0]], "call": 2e-6}
    found = {"products": [2.0, 1.0], "stream": [[4, 8.0], [8, 5.0]], "call": 2e-6}
    assert slowest([quick, slow]) == found
    assert slowest([quick]) == quick


PROBE = """
import json, sys, time
asked = json.loads(sys.stdin.readline())
for turn in range(3):
    time.sleep(0.02 * asked["number"])
    print("waiting", flush=True)
    assert sys.stdin.readline() == "go\\n"
    with open(asked["log"], "a") as log:
        log.write(f"{turn}")
if asked.get("fails") == asked["number"]:
    raise SystemExit("the reason")
print(json.dumps({"number": asked["number"]}), flush=True)
"""


def test_several_measure_in_step_and_who_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_probe.py").write_text(PROBE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asked = {"threads": 1, "log": str(tmp_path / "log")}
    answers = ask.ask(asked, 3, program="slow_probe")
    assert answers == [{"number": n} for n in range(3)]
    assert (tmp_path / "log").read_text() == "000111222"
    with pytest.raises(UserError, match="could not be measured: the reason"):
        ask.ask(asked | {"fails": 1}, 2, program="slow_probe")


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is tested on Linux")
@pytest.mark.slow
def test_the_link_of_two_processes_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path))
    said: list[str] = []
    found = here.network_of(2, said.append)
    assert found.link > 1e6
    assert 0 < found.latency < 1
    for way in ("exchange", "all_reduce", "all_gather"):
        (small, quick), *_, (large, slow) = found.measured[way]
        assert 0 < small < large
        assert 0 < quick <= slow < 10
    assert here.network_of(2, said.append).link == found.link
    assert len(said) == 1
