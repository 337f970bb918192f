import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cllm.core import atomic
from cllm.core.errors import UserError
from cllm.core.process import this_process
from cllm.store import draft as drafts
from cllm.store import lock
from cllm.store.draft import Draft
from cllm.store.run import RunDirectory
from cllm.store.status import Status, read_status, write_status


def make(out: Path | None = None, **options: object) -> RunDirectory:
    with Draft(out, **options) as draft:  # type: ignore[arg-type]
        draft.run.write_config("[train]\nlr = 0.1\n")
        return draft.commit()


def tree(path: Path) -> list[str]:
    return sorted(str(item.relative_to(path)) for item in path.rglob("*"))


def test_a_new_run(tmp_path: Path) -> None:
    run = make(tmp_path / "deep" / "er" / "run")
    assert tree(tmp_path) == [
        "deep",
        "deep/er",
        "deep/er/run",
        "deep/er/run/run.toml",
        "deep/er/run/status.json",
    ]
    opened = RunDirectory.open(run.path)
    assert opened == run
    assert opened.status().state == "new"
    assert opened.read_config() == {"train": {"lr": 0.1}}
    assert opened.name == "run"


def test_default_names_count_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [make(corpus="Tiny Shake/speare!").path for _ in range(2)]
    assert [path.parent for path in names] == [Path("runs"), Path("runs")]
    assert [path.name.split("-", 3)[3] for path in names] == [
        "tiny-shake-speare-1",
        "tiny-shake-speare-2",
    ]


def test_a_default_name_taken_meanwhile_counts_on(tmp_path: Path) -> None:
    with Draft(corpus="a", root=tmp_path) as first, Draft(corpus="a", root=tmp_path) as second:
        assert first.target == second.target
        for draft in (first, second):
            draft.run.write_config("")
        assert [first.commit().name[-1], second.commit().name[-1]] == ["1", "2"]


def test_a_chosen_name_taken_meanwhile_is_refused(tmp_path: Path) -> None:
    with Draft(tmp_path / "r") as draft:
        draft.run.write_config("")
        make(tmp_path / "r")
        with pytest.raises(UserError, match="is a run already"):
            draft.commit()
    assert tree(tmp_path) == ["r", "r/run.toml", "r/status.json"]


def test_failing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Draft(tmp_path / "new" / "run") as draft:
        draft.run.write_config(str(1 / 0))
    assert tree(tmp_path) == []


def test_an_empty_directory_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    inode = (tmp_path / "mount").stat().st_ino
    with pytest.raises(ZeroDivisionError), Draft(tmp_path / "mount") as draft:
        draft.run.write_config(str(1 / 0))
    assert tree(tmp_path) == ["mount"]
    run = make(tmp_path / "mount")
    assert tree(run.path) == ["run.toml", "status.json"]
    assert run.path.stat().st_ino == inode  # a mount point could not be replaced


def test_a_failing_commit_into_an_empty_directory_empties_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mount").mkdir()
    really = os.replace

    def fail_at_the_end(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "mount" / "status.json":
            raise OSError(28, "No space left on device")
        really(source, target)

    monkeypatch.setattr(drafts.os, "replace", fail_at_the_end)
    with pytest.raises(UserError, match="disk is full"):
        make(tmp_path / "mount")
    assert tree(tmp_path) == ["mount"]


def test_other_peoples_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    (tmp_path / "file").touch()
    run = make(tmp_path / "run")
    for path, says in (
        (tmp_path / "photos", "is not empty (a.jpg"),
        (tmp_path / "file", "is a file"),
        (run.path, f"--resume {run.path}"),
        (tmp_path / "file" / "below", "not a directory"),
    ):
        with pytest.raises(UserError) as caught:
            Draft(path)
        assert says in str(caught.value)
        assert str(path) in str(caught.value)
    assert tree(tmp_path) == [
        "file",
        "photos",
        "photos/a.jpg",
        "run",
        "run/run.toml",
        "run/status.json",
    ]


def test_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    # Refused by hand, as for the superuser, who may be running this, every directory is writable.
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot write .*run: no permission; choose another place"):
        Draft(tmp_path / "run")


def test_drafts_of_the_dead_are_cleared(tmp_path: Path) -> None:
    code = (
        "import sys; from cllm.store.draft import Draft; Draft(sys.argv[1]); import os; os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    assert len(atomic.leftovers(tmp_path)) == 1
    make(tmp_path / "run")
    assert tree(tmp_path) == ["run", "run/run.toml", "run/status.json"]


def test_open_suggests_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("runs/2026-01-01-shakespeare-1"))
    with pytest.raises(UserError, match=r"did you mean runs.2026-01-01-shakespeare-1\?"):
        RunDirectory.open("2026-01-01-shakespear-1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a run"):
        RunDirectory.open("empty")
    with pytest.raises(UserError, match="does not exist; `cllm runs list`"):
        RunDirectory.open("zzz")


def test_open_takes_a_checkpoint(run: RunDirectory) -> None:
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    atomic.point(run.checkpoints / "last", "step-00000010")
    for name in ("step-00000010", "last"):
        assert RunDirectory.open(run.checkpoints / name) == run


def test_newer_and_damaged_status(run: RunDirectory) -> None:
    file = run.path / "status.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps(good | {"format": 99}))
    with pytest.raises(UserError, match="update cllm"):
        RunDirectory.open(run.path)
    for damage in ("", "[]", "{}", json.dumps(good | {"state": "odd"})):
        file.write_text(damage)
        with pytest.raises(UserError, match="is damaged") as caught:
            RunDirectory.open(run.path)
    advised = str(caught.value).partition("contents by ")[2].partition(" to go on")[0]
    file.write_text(advised)
    assert RunDirectory.open(run.path).status().state == "interrupted"


def test_the_course_of_a_run(run: RunDirectory) -> None:
    run.note(parameters=10, corpus={"bytes": 5})
    with run.training() as training:
        status = run.status()
        assert status.state == "running"
        assert status.process == this_process()
        assert lock.is_locked(run.path)
        run.note(step=3)
        training.end("stopped early", "no better for 3 validations", step=4)
        with pytest.raises(AssertionError):
            training.end("finished")
    status = run.status()
    assert (status.state, status.reason) == ("stopped early", "no better for 3 validations")
    assert status.facts == {"parameters": 10, "corpus": {"bytes": 5}, "step": 4}
    assert status.end is not None
    assert not lock.is_locked(run.path)
    with run.training(from_step=4) as training:
        assert run.status().end is None
        training.end("finished")
    sessions = run.status().sessions
    assert [(s.from_step, s.state) for s in sessions] == [(0, "stopped early"), (4, "finished")]
    assert run.status().start == status.start


@pytest.mark.parametrize(
    ("error", "reason"),
    [(KeyboardInterrupt(), "stopped by the user"), (UserError("no\nspace"), "no space")],
)
def test_an_error_interrupts(run: RunDirectory, error: BaseException, reason: str) -> None:
    with pytest.raises(type(error)), run.training():
        raise error
    assert (run.status().state, run.status().reason) == ("interrupted", reason)
    assert not (run.path / "lock").exists()


def test_leaving_early_interrupts(run: RunDirectory) -> None:
    with run.training():
        pass
    assert run.status().state == "interrupted"


def test_a_dead_process_does_not_run(run: RunDirectory) -> None:
    dead = Status().begun(this_process().__class__(host=this_process().host, pid=2**22 + 1), 0)
    write_status(run.path, dead)
    status = read_status(run.path)
    assert status.state == "interrupted"
    assert status.sessions[-1].state == "interrupted"


def test_two_processes_do_not_train_in_one_run(run: RunDirectory) -> None:
    code = (
        "import sys; from cllm.store.run import RunDirectory\n"
        "with RunDirectory.open(sys.argv[1]).training(say=print):\n"
        "    print('in', flush=True); input()"
    )
    arguments = [sys.executable, "-c", code, str(run.path)]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        with (
            pytest.raises(UserError, match=f"being trained by process {first.pid}"),
            run.training(),
        ):
            pass
        assert run.status().state == "running"
        first.kill()
    said: list[str] = []
    with run.training(say=said.append):
        assert len(said) == 1
        assert f"process {first.pid}, which trained here, was killed" in said[0]
        assert [session.state for session in run.status().sessions] == ["interrupted", "running"]


def test_locks_that_cannot_be_judged(run: RunDirectory) -> None:
    file = run.path / "lock"
    file.write_text(json.dumps(this_process().to_json() | {"host": "elsewhere"}))
    with (
        pytest.raises(UserError, match=r"on the machine 'elsewhere'.*delete .*lock"),
        run.training(),
    ):
        pass
    assert file.exists()
    file.write_text("")  # killed before it was filled
    said: list[str] = []
    with run.training(say=said.append):
        pass
    assert "empty lock" in said[0]


def test_many_find_a_dead_lock_and_one_gets_it(run: RunDirectory) -> None:
    (run.path / "lock").write_text(json.dumps(this_process().to_json() | {"started": "long ago"}))
    barrier, done, got, refused = threading.Barrier(8), threading.Event(), [], []

    def train() -> None:
        barrier.wait()
        try:
            with lock.locked(run.path):
                got.append(1)
                done.wait(10)
        except UserError:
            refused.append(1)
            if len(refused) == 7:
                done.set()

    threads = [threading.Thread(target=train) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
