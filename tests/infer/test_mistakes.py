"""Wrong input to ``cllm generate`` and ``cllm score``: one clear line, and no file half-written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm.store import checkpoint as checkpoints

Cllm = Callable[..., Any]
PROMPT = ("--max-tokens", "3", "--temperature", "0")


@pytest.fixture
def run(trained: Path, isolated: Path) -> Path:
    """A copy of the trained run, to be changed, beside files of one prompt and of one text."""
    shutil.copytree(trained, isolated / "run", symlinks=True)
    (isolated / "p.jsonl").write_text('{"prompt": "The old"}\n')
    (isolated / "t.jsonl").write_text('{"text": "The old dog"}\n')
    return isolated / "run"


def refused(result: Any, code: int, *parts: str) -> None:
    """One line on stderr that holds ``parts``, and it is the last."""
    assert result.code == code, result.out + result.err
    lines = [line for line in result.err.splitlines() if line.startswith("cllm: ")]
    assert len(lines) == 1, result.err
    assert result.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.err
    for part in parts:
        assert part in lines[0]


def everything(path: Path) -> set[str]:
    """All that lies there."""
    return {str(file.relative_to(path)) for file in path.rglob("*")}


def uses(run: Path) -> list[tuple[object, ...]]:
    """Each command that reads the model's weights."""
    return [
        ("generate", run, "--prompt", "a", *PROMPT),
        ("generate", run, "--prompts", "p.jsonl", "--out", "o.jsonl", *PROMPT),
        ("score", run, "t.jsonl", "--out", "s.jsonl"),
        ("eval", run),
    ]


def test_a_nan_in_the_weights_is_told_and_no_answer_is_written(cllm: Cllm, run: Path) -> None:
    saved = checkpoints.load(run, "best")
    weights = {name: tensor.clone() for name, tensor in saved.weights.items()}
    weights["norm.weight"][0] = float("nan")
    checkpoints.save(
        run,
        saved.step + 1,
        weights=weights,
        optimizer=saved.optimizer,
        state=saved.state,
        keep_last=2,
        best=True,
    )
    before = everything(run.parent)
    for command in uses(run):
        refused(cllm(*command), 1, "not finite", "its weights are damaged")
        assert everything(run.parent) == before


@pytest.mark.parametrize("left", [0.0, 0.5, 0.999])
def test_a_truncated_checkpoint_is_told(cllm: Cllm, run: Path, left: float) -> None:
    file = checkpoints.find(run, "best") / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole))])
    before = everything(run.parent)
    for command in uses(run):
        refused(cllm(*command), 1, "model.safetensors is damaged")
    assert everything(run.parent) == before


def test_a_prompt_longer_than_the_context_is_read_from_its_end_and_said_so(
    cllm: Cllm, run: Path
) -> None:
    long = "The old dog. " * 400
    result = cllm("generate", run, "--prompt", long, *PROMPT)
    assert result.code == 0, result.err
    told = [line for line in result.err.splitlines() if "tokens and the model's context" in line]
    assert len(told) == 1
    (run.parent / "p.jsonl").write_text(json.dumps({"prompt": long}) + "\n")
    many = cllm("generate", run, "--prompts", "p.jsonl", "--out", "o.jsonl", *PROMPT)
    assert many.code == 0, many.err
    assert "1 prompts were longer than the context and lost their beginning" in many.err
    answer = json.loads((run.parent / "o.jsonl").read_text())
    assert answer["unread_prompt_tokens"] > 0
    assert result.out == long + answer["text"] + "\n"


def test_an_empty_prompt_begins_a_text(cllm: Cllm, run: Path) -> None:
    (run.parent / "p.jsonl").write_text('{"prompt": ""}\n')
    assert cllm("generate", run, "--prompts", "p.jsonl", "--out", "o.jsonl", *PROMPT).code == 0
    answer = json.loads((run.parent / "o.jsonl").read_text())
    assert answer["prompt_tokens"] == 1
    result = cllm("generate", run, "--prompt", "", *PROMPT)
    assert (result.code, result.out) == (0, answer["text"] + "\n")


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "p.jsonl:2 is not UTF-8"),
        (b'{"prompt": "a", "max_tokens": 0}\n', "p.jsonl:1: max_tokens = 0 must be at least 1"),
        (b'{"prompt": "a"\n', "p.jsonl:1 is not JSON"),
        (b"\n", "p.jsonl holds no line"),
    ],
)
def test_wrong_lines_leave_no_answers(cllm: Cllm, run: Path, body: bytes, part: str) -> None:
    (run.parent / "p.jsonl").write_bytes(body)
    before = everything(run.parent)
    refused(cllm("generate", run, "--prompts", "p.jsonl", "--out", "o.jsonl"), 1, part)
    assert everything(run.parent) == before


def test_no_slots_are_not_the_usual_number(cllm: Cllm, run: Path) -> None:
    before = everything(run.parent)
    command = ("generate", run, "--prompts", "p.jsonl", "--out", "o.jsonl", "--slots", "0")
    refused(cllm(*command), 2, "slots = 0 must be at least 1")
    assert everything(run.parent) == before


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b'{"text": "a\xff"}\n', "t.jsonl:1 is not UTF-8"),
        (b'{"text": "a"}\n{"text": ""}\n', "t.jsonl:2: an empty text has no likelihood"),
    ],
)
def test_wrong_texts_leave_no_scores(cllm: Cllm, run: Path, body: bytes, part: str) -> None:
    (run.parent / "t.jsonl").write_bytes(body)
    before = everything(run.parent)
    refused(cllm("score", run, "t.jsonl", "--out", "s.jsonl"), 1, part)
    assert everything(run.parent) == before


def test_a_missing_extra_names_the_line_and_leaves_no_answers(
    cllm: Cllm, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    before = everything(run.parent)
    (run.parent / "f.json").write_text("{}")
    for form in (("--regex", "a+"), ("--json-schema", "f.json")):
        for command in uses(run)[:2]:
            refused(cllm(*command, *form), 1, "pip install 'cllm[constrain]'")
    assert everything(run.parent) == before | {"f.json"}
