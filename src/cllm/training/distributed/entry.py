"""Where training begins in each process of torchrun: the first leads, the others follow."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from cllm.core.errors import UserError
from cllm.core.torchrun import (
    Launch,
    end_with_torchrun,
    launched,
    leave,
    leave_on_signals,
    leave_signals_to_the_first,
    leave_the_word_to_the_watch,
)
from cllm.store.run import RunDirectory, runs_in
from cllm.training.distributed.group import Group, LostProcessError
from cllm.training.distributed.team import serve
from cllm.training.interrupt import InterruptedRunError


@contextmanager
def joined() -> Iterator[Group | None]:
    """The group of a first process, whose others end with the block; ``None`` without torchrun.

    Any other process serves the first until the end, and ends.
    """
    launch = launched()
    if launch is None:
        yield None
        return
    if not launch.is_first:
        follow(launch)
    end_with_torchrun()
    group = Group.join(launch)
    try:
        yield group
    except LostProcessError:
        group.abandon()
        leave_the_word_to_the_watch()
        if not group.claim():
            leave(1)  # another has said it already
        raise
    except InterruptedRunError as error:
        group.blame_the_lost(error)
        raise
    except UserError:
        raise
    except BaseException as error:
        group.blame_the_lost(error)
        group.claim()
        group.abandon()
        raise
    finally:
        group.close()


def follow(launch: Launch) -> NoReturn:
    """Serve the first process until it is done, then end.

    Says something only where the first cannot: it, or another, is gone.
    """
    leave_on_signals()
    end_with_torchrun()
    try:
        group = Group.join(launch)
    except UserError:
        leave(1)  # the first says the same
    leave_signals_to_the_first()
    try:
        serve(group)
    except Exception as error:
        if os.environ.get("CLLM_DEBUG"):
            raise
        leave_the_word_to_the_watch()
        if group.claim():
            name = "" if isinstance(error, UserError) else f"process {launch.rank}: "
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"cllm: {name}{text}", file=sys.stderr)
        leave(1)
    group.close()
    leave(0)


class EndedRunError(UserError):
    """Torchrun started its processes again, and there is nothing to go on with."""

    def __init__(self, run: RunDirectory) -> None:
        status = run.status()
        why = f" ({status.reason})" if status.reason else ""
        super().__init__(
            f"torchrun started its processes again, but {run.path} ended before: {status.state}{why}"
        )
        self.exit_code = 1 if status.state == "diverged" else 0


def earlier_run(launch: Launch, out: Path | str | None) -> RunDirectory | None:
    """The run that an earlier start of the same torchrun began and did not end.

    Raises ``EndedRunError`` where it has ended and torchrun has started its processes again all the same:
    what diverged would diverge again, and what is finished would be trained twice.
    """
    found = [RunDirectory(Path(out))] if out is not None else runs_in(Path("runs"))
    for run in reversed(found):
        if not (run.path / "status.json").is_file():
            continue
        status = run.status()
        ended = status.state in ("finished", "stopped early", "diverged")
        if status.facts.get("job") != launch.job:
            continue
        if not ended:
            return run
        if launch.attempt:
            raise EndedRunError(run)
    return None
