"""The commands of README, and the Python of its guide, work as they are written.

``make`` itself is run by ``.ci/run``; here its targets are resolved without being run. The other blocks are
run in a fresh directory by a real shell and a real Python. What makes them quick is around them: a
``cllm`` on PATH that appends small settings to ``cllm train``, and a small text under the names that README
uses.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {
    "model.preset": "nano",
    "tokenizer.vocab_size": 300,
    "train.compile": "off",
    "train.threads": 1,
    "train.steps": 20,
    "train.eval_every": 10,
    "log.sample_tokens": 5,
}


def blocks(language: str, page: str = "README.md") -> list[str]:
    """Fenced blocks of a page in ``language``."""
    written = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", written, flags=re.DOTALL | re.MULTILINE)


def text(letters: int) -> str:
    """Some text with words in it."""
    words = ["dear", "friend", "the", "river", "was", "high", "again", "and", "we", "walked"]
    drawn = [words[(i * i + i // 7) % len(words)] for i in range(letters // 5)]
    return " ".join(drawn).replace("again", "again.\n")


@pytest.fixture
def desk(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A directory with notes in it, and the environment of a user whose runs are small."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "long.txt").write_text(text(60_000), encoding="utf-8")
    (tmp_path / "letters.txt").write_text(text(2_000), encoding="utf-8")
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    shim = f"""#!{sys.executable}
import sys
from cllm.cli import main
if sys.argv[1] == "train":
    sys.argv += {[*settings, "--quiet"]!r}
    if "--time" in sys.argv:
        sys.argv += ["--time", "4s"]
main()
"""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "cllm").write_text(shim, encoding="utf-8")
    (programs / "cllm").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "CLLM_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    return tmp_path, environment


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_first_commands_are_targets_of_the_makefile(tmp_path: Path) -> None:
    commands = [line.partition("#")[0].split() for line in blocks("sh")[0].splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]
    done = {}
    for _, target in commands:
        answer = subprocess.run(
            ["make", "-n", target, f"VENV={tmp_path}/venv"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        done[target] = answer.stdout
    for lines in done.values():
        assert "-m venv" in lines
        assert "pip install -c constraints.txt" in lines
    assert "cllm train --time" in done["demo"]
    assert "pytest" in done["test"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_everyday_commands(desk: tuple[Path, dict[str, str]]) -> None:
    place, environment = desk
    (block,) = blocks("sh")[1:]
    answer = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "report: runs/notes/report.md" in answer.stdout
    assert "letters.txt: " in answer.stdout
    assert "Dear friend," in answer.stdout
    assert "finished" in answer.stdout
    assert "train.dtype" in answer.stdout
    assert (place / "runs" / "notes" / "report.md").is_file()


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python(desk: tuple[Path, dict[str, str]], page: str) -> None:
    place, environment = desk
    small = {key.replace(".", "__"): value for key, value in SMALL.items()}
    around = f"""
import cllm
from cllm.api import train

def small_train(*args, **kwargs):
    short = {{"time": "4s"}} if "time" in kwargs else {{}}
    return train(*args, **{small!r} | kwargs | short | {{"quiet": True}})

cllm.train = small_train
"""
    code = around + "\n".join(blocks("python", page))
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert (" bits per byte\n" if page == "README.md" else "runs/none") in answer.stdout


def test_pictures_and_pages_are_there() -> None:
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    missing = [path for path in linked if not (ROOT / path).exists()]
    assert not missing
    assert "docs/images/demo.png" in linked


def test_bench_marks_are_there() -> None:
    assert re.search(r"<!-- bench:train -->\n.*\n<!-- /bench -->", README, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_demo(tmp_path: Path) -> None:
    """The command of ``make demo``, from an empty cache, in four minutes."""
    answer = subprocess.run(
        ["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    command = answer.stdout.splitlines()[-1].partition("cllm ")[2].split()
    environment = os.environ | {"CLLM_CACHE": str(tmp_path / "cache")}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-m", "cllm", *command],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for wanted in ("validation: ", "test: ", "sample 1:", "sample 3:", "run: ", "report: "):
        assert wanted in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="files have no executable bit")
def test_ci_is_executable() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR
