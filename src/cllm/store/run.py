"""A run: a directory that is all one needs to go on training, to look back, or to deploy."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cllm.core.atomic import clean_leftovers, clear_errors, write_text
from cllm.core.errors import UserError
from cllm.core.process import this_process
from cllm.store import steps
from cllm.store.lock import locked
from cllm.store.status import State, Status, read_status, write_status


@dataclass(frozen=True)
class RunDirectory:
    """The places in a run directory, and its status. ``open`` checks that it is one."""

    path: Path

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """The run at ``path`` (a run, or a checkpoint of one).

        Raises ``UserError`` if there is none, naming the run with the nearest name, or if it was made by
        a newer version.
        """
        path = Path(path)
        if steps.step_of(path) is not None or path.name in ("best", "last"):
            path = steps.locate(path)[0]
        if not is_run(path):
            raise UserError(_no_run(path))
        run = cls(path)
        read_status(path)
        return run

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        """``run.toml``: the whole resolved configuration."""
        return self.path / "run.toml"

    @property
    def tokenizer(self) -> Path:
        """``tokenizer.json``."""
        return self.path / "tokenizer.json"

    @property
    def data(self) -> Path:
        """``data/``: packed tokens."""
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        """``checkpoints/``."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """``metrics.jsonl``."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """``tensorboard/``."""
        return self.path / "tensorboard"

    @property
    def plots(self) -> Path:
        """``plots/``."""
        return self.path / "plots"

    @property
    def report(self) -> Path:
        """``report.md``."""
        return self.path / "report.md"

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first."""
        return steps.steps(self.path)

    def status(self) -> Status:
        """Where the run stands; ``interrupted`` where the process that was running is dead."""
        return read_status(self.path)

    def note(self, **facts: Any) -> None:
        """Set figures in the status (``step``, ``parameters``, ``validation_bpb``…); JSON values."""
        status = self.status()
        write_status(self.path, replace(status, facts=status.facts | facts))

    def write_config(self, toml: str) -> None:
        """Replace ``run.toml``."""
        write_text(self.config, toml)

    def read_config(self) -> dict[str, Any]:
        """``run.toml`` as nested tables. Raises ``UserError`` if it is not TOML."""
        with clear_errors(self.config, "read"):
            try:
                return tomllib.loads(self.config.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{self.config} is not valid TOML: {error}") from error

    @contextmanager
    def training(
        self, *, from_step: int = 0, say: Callable[[str], None] = lambda text: None
    ) -> Iterator[Training]:
        """Hold the run to train in it: lock it, clear what killed processes left, set ``running``.

        What the body does not end with ``Training.end`` ends as ``interrupted``: an exception, Ctrl-C, or
        leaving early. Raises ``UserError`` if another process trains in it.
        """
        with locked(self.path, say):
            clean_leftovers(self.checkpoints, alone=True)
            for folder in (self.path, self.data, self.plots):  # reports and packing need no lock
                clean_leftovers(folder)
            if self.checkpoints.is_dir():
                steps.refresh_links(self.path)
            write_status(self.path, self.status().begun(this_process(), from_step))
            session = Training(self)
            try:
                yield session
            except BaseException as error:
                if not session.over:
                    # On a full disk this fails too; the dead process then tells the same.
                    with suppress(UserError):
                        session.end("interrupted", _reason(error))
                raise
            if not session.over:
                session.end("interrupted")


class Training:
    """The right to train in a run, from ``RunDirectory.training``; ends once."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.over = False

    def end(self, state: State, reason: str = "", **facts: Any) -> None:
        """Record how training ended, with the last figures (see ``RunDirectory.note``)."""
        assert not self.over, "training ends once"
        assert state not in ("new", "running"), f"{state!r} is no end"
        status = self.run.status()
        write_status(
            self.run.path, replace(status, facts=status.facts | facts).ended(state, reason)
        )
        self.over = True


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory (whole, of whatever version)."""
    return (path / "run.toml").is_file() and (path / "status.json").is_file()


def runs_in(root: Path) -> list[RunDirectory]:
    """The runs directly in ``root``, by name."""
    if not root.is_dir():
        return []
    with clear_errors(root, "read"):
        found = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    return [RunDirectory(path) for path in found if is_run(path)]


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped by the user"
    return " ".join((str(error) or type(error).__name__).split())


def _no_run(path: Path) -> str:
    """Why ``path`` cannot be opened, with the nearest runs beside it or in ``runs``."""
    what = (
        "is not a run (it has no run.toml and status.json)" if path.exists() else "does not exist"
    )
    for root in dict.fromkeys((path.parent, Path("runs"))):
        close = get_close_matches(path.name, [run.name for run in runs_in(root)], n=1, cutoff=0.5)
        if close:
            return f"{path} {what} (did you mean {root / close[0]}?)"
    return f"{path} {what}; `cllm runs list` shows the runs there are"
