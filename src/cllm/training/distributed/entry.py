"""Where training begins in each process of torchrun: the first leads, the others follow."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from cllm.core.errors import UserError
from cllm.core.torchrun import Launch, launched, leave, leave_signals_to_the_first
from cllm.store.run import RunDirectory, runs_in
from cllm.training.distributed.group import Group, LostProcessError
from cllm.training.distributed.team import serve


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
    group = Group.join(launch)
    try:
        yield group
    except LostProcessError:
        group.abandon()
        if not group.claim():
            leave(1)  # another has said it already
        raise
    except UserError:
        raise
    except BaseException:
        group.claim()
        group.abandon()
        raise
    finally:
        group.close()


def follow(launch: Launch) -> NoReturn:
    """Serve the first process until it is done, then end.

    Says something only where the first cannot: it, or another, is gone.
    """
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
        if group.claim():
            name = "" if isinstance(error, UserError) else f"process {launch.rank}: "
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"cllm: {name}{text}", file=sys.stderr)
        leave(1)
    group.close()
    leave(0)


def earlier_run(job: str, out: Path | str | None) -> RunDirectory | None:
    """The run that an earlier start of the same torchrun began and did not end."""
    found = [RunDirectory(Path(out))] if out is not None else runs_in(Path("runs"))
    for run in reversed(found):
        if not (run.path / "status.json").is_file():
            continue
        status = run.status()
        ended = status.state in ("finished", "stopped early", "diverged")
        if status.facts.get("job") == job and not ended:
            return run
    return None
