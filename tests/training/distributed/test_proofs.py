"""Every strategy and schedule computes what one process computes: real processes, float64."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROVER = Path(__file__).with_name("prover.py")
Start = Callable[..., subprocess.Popen[str]]
STEPS = 50
EXACT = 1e-9
WATCHDOG = 600
"""Seconds after which a deadlock has been found."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun is tested on Linux")


def stages(schedule: str, layers: int, *more: str) -> str:
    """A case of the prover."""
    settings = ["train.pipeline.mode=stages", f"train.pipeline.schedule={schedule}"]
    return ",".join([*settings, f"model.n_layers={layers}", *more])


FEW = ["", "train.parallel.strategy=fsdp", stages("1f1b", 2)]
ALL = [
    *FEW[:2],
    "train.accumulate=4,train.optimizer=sgd,model.tie_embeddings=false",
    "model.embedding.kind=reduced,model.embedding.rank=7,model.norm=layernorm",
    "train.parallel.strategy=fsdp,train.accumulate=4,train.optimizer=sgd,model.tie_embeddings=false",
    "train.parallel.strategy=fsdp,model.embedding.kind=reduced,model.embedding.rank=7,train.clip=0",
    stages("gpipe", 8),
    stages("1f1b", 8, "model.tie_embeddings=false", "train.optimizer=sgd"),
    stages("interleaved", 8),
    stages("zero-bubble", 9, "model.positions=learned"),
    stages("zbv", 8, "train.accumulate=2"),
]


def check(lines: Path, cases: list[str]) -> None:
    """What the prover wrote: differences against one process, relative or in nats."""
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [each["case"] for each in found] == cases
    for each in found:
        for what in ("gradient", "curve", "weights", "evaluation"):
            assert each[what] <= EXACT, (each["case"], what, each[what])
        assert each["worst"][0] <= EXACT, each["worst"]  # no parameter hides behind the others
        assert each["falls"] > 0, each["case"]
        alone, together = each["norms"][::2], each["norms"][1::2]
        assert together == pytest.approx(alone, rel=EXACT), each["case"]


def test_two_processes_follow_the_curve_of_one(torchrun: Start, tmp_path: Path) -> None:
    child = torchrun(2, PROVER, tmp_path / "found", STEPS, *FEW)
    said, _ = child.communicate()
    assert child.returncode == 0, said
    check(tmp_path / "found", FEW)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_strategy_and_schedule(processes: int, torchrun: Start, tmp_path: Path) -> None:
    child = torchrun(processes, PROVER, tmp_path / "found", STEPS, *ALL)
    said, _ = child.communicate()
    assert child.returncode == 0, said
    check(tmp_path / "found", ALL)


@pytest.mark.slow
def test_random_delays_at_every_hand_over_change_nothing(torchrun: Start, tmp_path: Path) -> None:
    seed = str(random.random())
    print("delays", seed)
    cases = [*FEW, stages("interleaved", 4), stages("zero-bubble", 4)]
    child = torchrun(2, PROVER, tmp_path / "found", 20, *cases, environ={"DELAYS": seed})
    said, _ = child.communicate(timeout=WATCHDOG)
    assert child.returncode == 0, said
    check(tmp_path / "found", cases)


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[list[str]]:
    """Two network namespaces with a cable between them; skips where this user may make none."""
    names = [f"cllm-{tmp_path.name[-8:].strip('-_')}-{i}" for i in range(2)]
    cable = ["cllmv0", "cllmv1"]
    steps = [["netns", "add", name] for name in names]
    steps += [["link", "add", cable[0], "type", "veth", "peer", "name", cable[1]]]
    for i, name in enumerate(names):
        inside = ["-n", name]
        steps += [["link", "set", cable[i], "netns", name]]
        steps += [[*inside, "addr", "add", f"10.77.0.{i + 1}/24", "dev", cable[i]]]
        steps += [[*inside, "link", "set", device, "up"] for device in (cable[i], "lo")]
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    try:
        for step in steps:
            done = subprocess.run(["ip", *step], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"may not make a network: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", cable[0]], capture_output=True, check=False)


@pytest.mark.slow
def test_two_hosts(torchrun: Start, two_hosts: list[str], tmp_path: Path) -> None:
    children = []
    for number, name in enumerate(two_hosts):
        options = ("--nnodes", "2", "--node-rank", str(number))
        options += ("--master-addr", "10.77.0.1", "--master-port", "29511")
        children.append(
            torchrun(
                1,
                PROVER,
                tmp_path / "found",
                STEPS,
                *FEW,
                options=options,
                before=["ip", "netns", "exec", name],
                environ={"GLOO_SOCKET_IFNAME": f"cllmv{number}"},
            )
        )
    for child in children:
        said, _ = child.communicate()
        assert child.returncode == 0, said
    check(tmp_path / "found", FEW)
