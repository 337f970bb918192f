import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cllm.core import atomic
from cllm.core.errors import UserError


def entries(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


def test_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old\n")
    with pytest.raises(TypeError), atomic.new_file(path) as file:
        file.writelines([b"half", "not bytes"])  # type: ignore[list-item]
    assert path.read_bytes() == b"old\n"
    atomic.write_text(path, "new ü\n")
    assert path.read_bytes() == "new ü\n".encode()
    assert entries(tmp_path) == ["a.txt"]


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    with atomic.new_directory(tmp_path / "d") as new:
        (new / "f").write_text("x")
        assert not (tmp_path / "d").exists()
    assert (tmp_path / "d" / "f").read_text() == "x"
    assert entries(tmp_path) == ["d"]


def test_directory_replaces_an_older_one_or_leaves_it(tmp_path: Path) -> None:
    for content in ("1", "2"):
        with atomic.new_directory(tmp_path / "d") as new:
            (new / content).write_text(content)
    assert entries(tmp_path / "d") == ["2"]
    with pytest.raises(TypeError):
        fill(tmp_path / "d", text=3)
    assert entries(tmp_path / "d") == ["2"]
    assert entries(tmp_path) == ["d"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_refusals_become_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic, "flush_to_disk", refuse)
    for write in (
        lambda: atomic.write_text(tmp_path / "f", "x"),
        lambda: fill(tmp_path / "d"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            write()
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert entries(tmp_path) == []


def fill(path: Path, text: object = "x") -> None:
    with atomic.new_directory(path) as new:
        (new / "f").write_text(text)  # type: ignore[arg-type]


def test_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*nowhere"):
        atomic.write_text(tmp_path / "nowhere" / "f", "x")


def test_leftovers_of_the_dead_only(tmp_path: Path) -> None:
    dead = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from cllm.core.atomic import temporary_beside;"
            "path = temporary_beside(Path(sys.argv[1])); path.mkdir(); print(path)",
            tmp_path / "step",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    mine = atomic.temporary_beside(tmp_path / "step")
    mine.mkdir()
    (tmp_path / "other").write_text("stays")
    assert atomic.leftovers(tmp_path) == [Path(dead)]
    assert atomic.clean_leftovers(tmp_path) == [Path(dead)]
    assert entries(tmp_path) == sorted([mine.name, "other"])
    assert atomic.leftovers(tmp_path / "missing") == []


def test_a_used_again_process_id_is_not_the_writer(tmp_path: Path) -> None:
    mine = atomic.temporary_beside(tmp_path / "f")
    head, _, random = mine.name.rpartition(".")
    forged = mine.with_name(f"{head[:-8]}00000000.{random}")  # same id, another start time
    forged.touch()
    assert atomic.leftovers(tmp_path) == [forged]


def test_other_machines_get_a_day_unless_we_hold_the_lock(tmp_path: Path) -> None:
    foreign = tmp_path / f"{atomic.PREFIX}f.1.00000000-00000000.00000000"
    foreign.touch()
    assert atomic.leftovers(tmp_path) == []
    assert atomic.leftovers(tmp_path, alone=True) == [foreign]
    os.utime(foreign, (0, 0))
    assert atomic.leftovers(tmp_path) == [foreign]


def test_remove_takes_files_directories_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "d" / "deep").mkdir(parents=True)
    for name in ("f", "d", "missing"):
        atomic.remove(tmp_path / name)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("symlinks", [True, False])
def test_pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symlinks: bool) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EPERM, "not permitted")

    if not symlinks:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    link = tmp_path / "last"
    assert atomic.pointed_at(link) is None
    for name in ("step-1", "step-2"):
        (tmp_path / name).mkdir()
        atomic.point(link, name)
        assert atomic.pointed_at(link) == name
    assert link.is_symlink() == symlinks
    assert entries(tmp_path) == ["last", "step-1", "step-2"]


def test_file_size_limit_of_the_system(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="ulimit -f"):
            atomic.write_text(tmp_path / "f", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert entries(tmp_path) == []
