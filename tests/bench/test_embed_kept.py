"""Figures of trainings are kept in the project's file, a line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm.bench.embed_kept import NAME, Figures, Kept, Words, figures_of, machines
from cllm.core.errors import UserError
from cllm.store.run import RunDirectory
from cllm.store.steps import best_step

FILE = Path("docs", "results", NAME)


def line(key: str = "0123456789abcdef", **changes: Any) -> dict[str, Any]:
    return {
        "corpus": "built-in",
        "tokens": "2.5 M",
        "table": "reduced 64",
        "start": "corpus",
        "steps": 1.0,
        "lr": 0.003,
        "dropout": 0.1,
        "validations": 20,
        "seed": 0,
        "key": key,
        "validation_bpb": 1.9,
        "best_at": 0.95,
        "table_numbers": 1000,
        "table_bytes": 4000,
        "half_width_retains": 0.9,
        "log2_defects": [1.5, 0.5],
        "processor": "a processor",
        "threads": 1,
        "dtype": "fp32",
        "date": "2026-01-31",
        "cllm": "0.1.0",
        "torch": "2.9.0",
    } | changes


def put(*lines: str) -> None:
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")


def test_what_was_added_is_there_again(isolated: Path) -> None:
    figures = Figures(**line())
    Kept(write=True).add(figures)
    assert Kept(write=False).get(figures.key) == figures
    assert Kept(write=False).get("f" * 16) is None


def test_without_write_the_file_is_only_read(isolated: Path) -> None:
    kept = Kept(write=False)
    kept.add(Figures(**line()))
    assert kept.get("0123456789abcdef") is not None
    assert not FILE.exists()


def test_lines_are_appended_to_what_others_wrote(isolated: Path) -> None:
    one, two, three = "1" * 16, "2" * 16, "3" * 16
    put(json.dumps(line(one)))
    kept = Kept(write=True)
    # Meanwhile another bench writes, and someone's editor leaves the last line open.
    FILE.write_text(FILE.read_text() + json.dumps(line(two)), encoding="utf-8")
    kept.add(Figures(**line(two)))
    kept.add(Figures(**line(three)))
    keys = [json.loads(text)["key"] for text in FILE.read_text(encoding="utf-8").splitlines()]
    assert keys == [one, two, three]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ('{"key": "0123', "JSON"),
        (json.dumps({k: v for k, v in line("2" * 16).items() if k != "seed"}), "seed"),
        (json.dumps(line("2" * 16, unheard=1)), "unheard"),
        (json.dumps(line("2" * 16, validation_bpb=float("nan"))), "validation_bpb"),
        (json.dumps(line("2" * 16, validation_bpb=-1.0)), "validation_bpb"),
        (json.dumps(line("2" * 16, best_at=0)), "best_at"),
        (json.dumps(line("no key")), "key"),
        (json.dumps(line("1" * 16)), "same training as line 1"),
    ],
)
def test_a_broken_line_is_named_in_one_line(
    cllm: Callable[..., Any], second: str, says: str
) -> None:
    put(json.dumps(line("1" * 16)), second)
    result = cllm("bench", "embed", "--minutes", 0)
    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert f"{NAME}, line 2" in result.err
    assert says in result.err
    assert "delete" in result.err


def test_a_file_that_is_no_text_is_one_line(isolated: Path) -> None:
    put("")
    FILE.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        Kept(write=False)


def test_figures_are_those_of_the_run(trained: Path) -> None:
    words = Words(
        corpus="c",
        tokens="t",
        table="dense",
        start="s",
        steps=1.0,
        lr=0.1,
        dropout=0.0,
        validations=20,
        seed=2,
    )
    run = RunDirectory.open(trained)
    facts, found = run.status().facts, figures_of(run, "0" * 16, words)
    assert found.validation_bpb == facts["validation_bpb"]
    assert found.table_numbers == facts["table"]["numbers"]
    assert found.table_bytes == facts["table"]["bytes"]
    assert (found.threads, found.dtype, found.log2_defects) == (1, "fp32", None)
    assert found.best_at == best_step(trained) / run.read_config()["train"]["steps"]
    assert found.torch == facts["versions"]["torch"]


def test_a_precision_is_that_of_what_is_compared(isolated: Path) -> None:
    """Trainings that tuned the rate are compared with each other only."""
    tuning, compared = Figures(**line(validations=1)), Figures(**line("1" * 16, dtype="bf16"))
    kept = Kept(write=False)
    kept.add(tuning)
    assert (kept.precision(tuning), kept.precision(compared)) == ("fp32", None)
    kept.add(compared)
    assert (kept.precision(tuning), kept.precision(compared)) == ("fp32", "bf16")
    assert kept.precision(Figures(**line(seed=1))) is None


def test_machines_are_counted() -> None:
    found = [Figures(**line("1" * 16)), Figures(**line("2" * 16, processor="another", threads=2))]
    said = machines([*found, found[1]])
    assert said.startswith("2 on another (2 threads, fp32,")
    assert "; 1 on a processor (1 thread, fp32," in said
    assert machines([]) == ""
