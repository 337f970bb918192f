"""``cllm generate --prompts`` killed in its midst and started again: real processes, a real SIGKILL."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_answers_survive_a_kill_in_their_order_and_none_is_lost(
    trained: Path,
    process: Callable[..., subprocess.Popen[str]],
    isolated: Path,
    cllm: Callable[..., Any],
) -> None:
    lines = [
        {"prompt": f"The old dog {n}", "seed": n, "max_tokens": 30 + 30 * (n % 3)}
        for n in range(24)
    ]
    prompts = isolated / "p.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("generate", trained, "--prompts", prompts, "--slots", "3", "--eager", "--out")
    killed = isolated / "killed.jsonl"
    child = process(*command, killed)
    while not killed.exists() or killed.read_bytes().count(b"\n") < 2:
        assert child.poll() is None, child.stderr.read() if child.stderr else ""
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "it ended before it was killed"
    left = killed.read_bytes()
    assert 2 <= left.count(b"\n") < len(lines)
    again = cllm(*command, killed)
    assert again.code == 0, again.err
    assert f"{left.count(chr(10).encode())} of them kept from before" in again.err
    straight = cllm(*command, isolated / "straight.jsonl")
    assert straight.code == 0, straight.err
    whole = killed.read_bytes()
    assert whole == (isolated / "straight.jsonl").read_bytes()
    assert whole.startswith(left[: left.rfind(b"\n") + 1])
    found = [json.loads(line) for line in whole.splitlines()]
    assert [answer["index"] for answer in found] == list(range(len(lines)))
    assert [answer["prompt"] for answer in found] == [line["prompt"] for line in lines]
