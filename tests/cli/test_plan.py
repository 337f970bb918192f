"""``cllm plan``: a table with the best in one line, JSON, and mistakes."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm.core.machine import machine
from cllm.training.plan import here

ROOT = Path(__file__).parents[2]
LIST = [
    {
        "name": "card",
        "count": 4,
        "tflops": {"bf16": 100.0},
        "memory_gb": 8.0,
        "memory_gb_s": 1000.0,
        "link_gb_s": 10.0,
        "latency_us": 5.0,
    }
]
Cllm = Callable[..., Any]


@pytest.fixture
def machines(isolated: Path) -> Path:
    path = isolated / "machines.json"
    path.write_text(json.dumps(LIST))
    return path


def test_other_machines(cllm: Cllm, machines: Path) -> None:
    arguments = ["plan", "--preset", "nano", "--machines", machines, "--tokens", "1e9"]
    result = cllm(*arguments, "--devices", "1,4,3")
    assert result.code == 0, result.err
    for word in ("one device", "DDP", "FSDP", "pipeline of 2 ×", "do not divide among 3"):
        assert word in result.out
    (best,) = [line for line in result.out.splitlines() if line.startswith("best: ")]
    assert "--preset nano" in best or "no command" in best
    body = json.loads(cllm(*arguments, "--json").out)
    assert body["tokens"] == 10**9
    assert body["best"] in {e["strategy"] for e in body["estimates"]}
    assert all(e["devices"] == 4 for e in body["estimates"])
    for estimate in body["estimates"]:
        assert estimate["memory_total"] > estimate["memory"]["activations"] > 0


def test_this_machine_and_its_text(
    cllm: Cllm, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = dataclasses.replace(machine(), cores=1, quota=None, threads=1)
    monkeypatch.setattr(here, "machine", lambda: one)
    small = ["--preset", "nano", "--set", "train.batch_size=4", "--set", "train.compile=off"]
    small += ["--set", "train.dtype=fp32"]
    result = cllm("plan", *small, "--set", "tokenizer.vocab_size=300", "--data", corpus, "--json")
    assert result.code == 0, result.err
    body = json.loads(result.out)
    assert body["tokens"] > 10_000
    assert [e["strategy"] for e in body["estimates"]] == ["one process, 1 thread"]
    assert body["estimates"][0]["memory"]["base"] > 50e6
    assert "measuring this machine once: 1 thread, fp32, eager code" in result.err
    assert body["best"] == "one process, 1 thread"
    result = cllm("plan", *small, "--tokens", "1e6")
    last = result.out.splitlines()[-1]
    assert last.startswith(
        "best: one process, 1 thread on 1: cllm train --preset nano --set train."
    )


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--data", "x", "--tokens", "5"], "leave one of them out"),
        (["--devices", "2"], "give --machines"),
        (["--machines", "none.json"], "there is no machine list none.json"),
        (["--machines", "machines.json", "--devices", "2,x"], "--devices wants numbers"),
        (["--machines", "machines.json", "--set", "train.dtype=fp32"], "no tflops for fp32"),
    ],
)
def test_mistakes(arguments: list[str], why: str, cllm: Cllm, machines: Path) -> None:
    result = cllm("plan", *arguments)
    assert result.code == 2
    assert why in result.err
    assert len(result.err.splitlines()) == 1


def test_the_table_of_the_docs_is_what_the_command_prints(
    cllm: Cllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "plan.md"
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.endswith("--devices 1,8,64,512,1024")]
    table = text.split("```text\n")[1].split("```")[0]
    result = cllm(*shlex.split(line)[1:])
    assert [row.rstrip() for row in result.out.splitlines()] == table.splitlines()
