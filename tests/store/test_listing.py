import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cllm.cli.runs import app
from cllm.core import atomic
from cllm.core.errors import UserError
from cllm.store.cleaning import clean, find_waste
from cllm.store.draft import Draft
from cllm.store.listing import compare, list_runs, row_of, size_of
from cllm.store.metrics import MetricsLog
from cllm.store.run import RunDirectory
from cllm.store.status import Status, write_status


def make(root: Path, name: str, config: str = "[train]\nsteps = 10\n") -> RunDirectory:
    with Draft(root / name) as draft:
        draft.run.write_config(config)
        return draft.commit()


def add_checkpoints(run: RunDirectory, *steps: int, best: int | None = None) -> None:
    from cllm.store.manifest import Manifest, write_manifest

    for step in steps:
        directory = run.checkpoints / f"step-{step:08d}"
        directory.mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(b"x" * 1000)
        write_manifest(directory, Manifest(step=step, best=step == best))


def finish(run: RunDirectory, **facts: object) -> None:
    with run.training() as training:
        training.end("finished", **facts)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three runs: finished, killed in the middle, and damaged."""
    done = make(tmp_path, "done")
    add_checkpoints(done, 2, 4, 6, 8, 10, best=4)
    finish(
        done,
        step=10,
        parameters=1_310_720,
        validation_bpb=1.25,
        test_bpb=1.5,
        tokens_per_second=30_000,
    )
    killed = make(tmp_path, "killed", "[train]\nsteps = 20\nbetas = [0.9, 0.95]\n")
    add_checkpoints(killed, 4)
    with MetricsLog(killed.metrics) as log:
        log.write(7, "train", loss=2.0, time={"tokens_per_second": 123.0})
        log.write(4, "validation", bpb=1.75)
    write_status(killed.path, Status(state="running", created="2030-01-01T00:00:00+00:00"))
    (make(tmp_path, "damaged").path / "status.json").write_text("{")
    (tmp_path / "not-a-run").mkdir()
    return tmp_path


def test_rows(root: Path) -> None:
    rows = {row.name: row for row in list_runs(root)}
    assert list(rows) == ["damaged", "done", "killed"]  # by date; the damaged one has none
    done = rows["done"]
    assert (done.state, done.step, done.steps, done.parameters) == ("finished", 10, 10, 1_310_720)
    assert (done.validation_bpb, done.test_bpb, done.tokens_per_second) == (1.25, 1.5, 30_000)
    assert done.bytes == size_of(root / "done") > 5_000
    killed = rows["killed"]
    assert (killed.step, killed.steps, killed.validation_bpb) == (7, 20, 1.75)
    assert killed.tokens_per_second == 123.0
    assert killed.parameters is None
    assert rows["damaged"].state.startswith("damaged: ")
    assert list_runs(root / "nowhere") == []


def test_compare(root: Path) -> None:
    runs = [RunDirectory.open(root / name) for name in ("done", "killed")]
    result = compare(runs)
    assert result.names == ["done", "killed"]
    assert result.settings == [("train.steps", [10, 20]), ("train.betas", [None, [0.9, 0.95]])]
    results = dict(result.results)
    assert results["validation_bpb"] == [1.25, 1.75]
    assert results["step"] == [10, 7]
    with pytest.raises(UserError, match="at least two"):
        compare(runs[:1])


def test_only_waste_goes(root: Path) -> None:
    never = make(root, "never-saved")
    with pytest.raises(KeyboardInterrupt), never.training():
        raise KeyboardInterrupt
    new = make(root, "new")  # about to train
    orphan = root / "done" / "checkpoints" / f"{atomic.PREFIX}step.{2**22 + 1}.0-0.0"
    orphan.mkdir()
    found = find_waste(root)
    assert {item.path for item in found} == {never.path, orphan}
    assert clean(found) == sum(item.bytes for item in found)
    assert not never.path.exists()
    assert not orphan.exists()
    assert new.path.exists()
    assert find_waste(root) == []


def test_checkpoints_but_best_and_last(root: Path) -> None:
    found = find_waste(root, checkpoints=True)
    assert [item.path.name for item in found] == ["step-00000002", "step-00000006", "step-00000008"]
    before = row_of(RunDirectory(root / "done")).bytes
    freed = clean(found)
    assert RunDirectory(root / "done").steps() == [4, 10]
    assert row_of(RunDirectory(root / "done")).bytes == before - freed


def test_a_run_in_training_is_left_alone(root: Path) -> None:
    with RunDirectory(root / "done").training() as training:
        assert find_waste(root, checkpoints=True) == []
        training.end("finished")
    assert len(find_waste(root, checkpoints=True)) == 3


def test_an_old_run_that_never_began(root: Path) -> None:
    old = make(root, "old")
    write_status(old.path, Status(created="2020-01-01T00:00:00+00:00"))
    assert [item.path for item in find_waste(root)] == [old.path]


def test_command_list(root: Path) -> None:
    shown = CliRunner().invoke(app, ["list", str(root)])
    assert shown.exit_code == 0, shown.output
    done = next(line for line in shown.output.splitlines() if "done" in line)
    for text in ("finished", "10/10", "1,310,720", "1.2500", "1.5000", "30,000"):
        assert text in done
    rows = json.loads(CliRunner().invoke(app, ["list", str(root), "--json"]).output)
    assert [row["name"] for row in rows] == ["damaged", "done", "killed"]
    assert "No runs in" in CliRunner().invoke(app, ["list", str(root / "none")]).output


def test_command_compare(root: Path) -> None:
    arguments = ["compare", str(root / "done"), str(root / "killed")]
    shown = CliRunner().invoke(app, arguments).output
    assert "train.betas" in shown
    assert "[0.9, 0.95]" in shown
    assert "1.7500" in shown
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)["names"] == [
        "done",
        "killed",
    ]
    same = CliRunner().invoke(app, ["compare", str(root / "done"), str(root / "done")]).output
    assert "The settings are the same." in same


def test_command_clean(root: Path) -> None:
    arguments = ["clean", str(root), "--checkpoints"]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"]).output
    assert "would free" in dry
    assert dry.count("neither best nor last") == 3
    assert len(RunDirectory(root / "done").steps()) == 5
    wet = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert wet["deleted"] is True
    assert wet["bytes"] == sum(item["bytes"] for item in wet["items"])
    assert RunDirectory(root / "done").steps() == [4, 10]


def test_listing_needs_no_torch(root: Path) -> None:
    code = (
        "import sys; from cllm.cli.runs import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    for arguments in (["list", str(root)], ["clean", str(root), "--dry-run", "--checkpoints"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
