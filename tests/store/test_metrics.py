import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.core.errors import UserError
from cllm.store.metrics import MetricsLog, cut_after, last_line, read_columns, read_lines


def write_steps(log: MetricsLog, first: int, last: int, speed: float) -> None:
    for step in range(first, last + 1):
        log.write(step, "train", loss=10.0 / step, time={"tokens_per_second": speed})
        if step % 2 == 0:
            log.write(step, "validation", bpb=5.0 / step)


def test_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        write_steps(log, 1, 4, 100.0)
        log.write(5, "train", loss=float("nan"), lr=0.1)
    columns = read_columns(path, "train")
    assert columns["step"] == [1, 2, 3, 4, 5]
    assert columns["loss"][:4] == [10.0, 5.0, 10.0 / 3, 2.5]
    assert math.isnan(columns["loss"][4])
    assert columns["time.tokens_per_second"][:4] == [100.0] * 4
    assert all(math.isnan(value) for value in columns["lr"][:4])
    assert read_columns(path, "validation")["bpb"] == [2.5, 1.25]
    assert read_columns(path, "test") == {}
    assert read_columns(tmp_path / "none", "train") == {}


def test_lines_are_strict_json_and_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(
            1, "train", loss=math.inf, nested={"a": [-math.inf, math.nan, 1.0]}, text="ü\n\ud800"
        )
        raw = path.read_bytes()
    line = json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["loss"] is None
    assert line["nested"] == {"a": [None, None, 1.0]}
    assert raw.count(b"\n") == 1


def test_a_resumed_run_has_the_lines_of_a_straight_one(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    with MetricsLog(straight) as log:
        write_steps(log, 1, 9, 1.0)
    with MetricsLog(resumed) as log:
        write_steps(log, 1, 7, 2.0)
    with resumed.open("a") as file:
        file.write('{"step": 8, "ki')  # torn by the kill
    with MetricsLog(resumed, resume_from=4) as log:
        write_steps(log, 5, 9, 3.0)

    def without_time(path: Path) -> list[dict[str, object]]:
        return [{k: v for k, v in line.items() if k != "time"} for line in read_lines(path)]

    assert without_time(straight) == without_time(resumed)
    assert [path.name for path in tmp_path.iterdir()].count("b.jsonl") == len(
        list(tmp_path.iterdir())
    ) - 1


@given(st.integers(0, 400), st.integers(0, 6))
def test_a_tear_anywhere_costs_one_line_at_most(
    tmp_path_factory: pytest.TempPathFactory, cut: int, step: int
) -> None:
    path = tmp_path_factory.mktemp("tear") / "metrics.jsonl"
    with MetricsLog(path) as log:
        write_steps(log, 1, 5, 1.0)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    lines = list(read_lines(path))
    assert lines == [
        json.loads(line) for line in whole[:cut].splitlines(True) if line.endswith(b"\n")
    ]
    cut_after(path, step)
    assert list(read_lines(path)) == [line for line in lines if line["step"] <= step]
    assert not path.read_bytes() or path.read_bytes().endswith(b"\n")


def test_damage_inside_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for damage in ("oops", "[]", '{"step": 1}'):
        path.write_text(
            f'{{"step": 1, "kind": "train"}}\n{damage}\n{{"step": 2, "kind": "train"}}\n'
        )
        with pytest.raises(UserError, match="line 2 is damaged"):
            list(read_lines(path))


def test_zeros_after_a_power_cut_are_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for zeros in (b"\0" * 100, b"\0" * 100 + b"\n"):
        path.write_bytes(b'{"step": 1, "kind": "train"}\n' + zeros)
        assert len(list(read_lines(path))) == 1
    cut_after(path, 1)
    assert path.read_bytes() == b'{"step": 1, "kind": "train"}\n'


def test_resuming_without_its_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        MetricsLog(tmp_path / "metrics.jsonl", resume_from=3)


def test_starting_anew_empties_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with MetricsLog(path) as log:
            log.write(1, "train")
    assert len(list(read_lines(path))) == 1


def test_last_line_reads_only_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, "early")
        for step in range(2, 3000):
            log.write(step, "train", loss=1.0)
    assert path.stat().st_size > 2 * 65_536
    assert last_line(path, "train") == {"step": 2999, "kind": "train", "loss": 1.0}
    assert last_line(path, "early") is None


def test_unwritable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl"):
        MetricsLog(tmp_path / "none" / "metrics.jsonl")
