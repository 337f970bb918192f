"""``status.json`` of a run: where it stands, and the few figures that a list of runs shows.

It is small and replaced atomically; the history is in ``metrics.jsonl``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from cllm.core.atomic import clear_errors, write_json
from cllm.core.errors import UserError
from cllm.core.process import Process, is_running

FORMAT = 1
"""The version of the run directory's format that is written."""

NAME = "status.json"

State = Literal["new", "running", "finished", "stopped early", "interrupted", "diverged"]


@dataclass(frozen=True, kw_only=True)
class Session:
    """One process's work on a run. Times are ISO 8601 in UTC."""

    start: str
    end: str | None = None
    from_step: int = 0
    state: State = "running"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a run stands."""

    state: State = "new"
    reason: str = ""
    """Why it ended so, in a few words; often empty."""
    created: str = ""
    start: str | None = None
    """When training began first (ISO 8601, UTC)."""
    end: str | None = None
    """When it last ended; ``None`` while it runs."""
    process: Process | None = None
    """Who trains, or trained last."""
    sessions: tuple[Session, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """Figures for lists and reports: ``step``, ``parameters``, ``validation_bpb``, ``test_bpb``,
    ``tokens_per_second``, ``corpus``, ``machine``, ``warnings``…"""

    def begun(self, process: Process, from_step: int) -> Status:
        """This status when ``process`` begins to train at ``from_step``."""
        session = Session(start=now(), from_step=from_step)
        return replace(
            self.settled(),
            state="running",
            reason="",
            start=self.start or session.start,
            end=None,
            process=process,
            sessions=(*self.settled().sessions, session),
        )

    def ended(self, state: State, reason: str = "") -> Status:
        """This status when the present session ends in ``state``."""
        end = now()
        *before, last = self.sessions
        last = replace(last, end=end, state=state, reason=reason)
        return replace(self, state=state, reason=reason, end=end, sessions=(*before, last))

    def settled(self) -> Status:
        """This status, ``interrupted`` if it says ``running`` but its process is dead."""
        if self.state != "running" or (self.process and is_running(self.process) is not False):
            return self
        reason = "its process was killed"
        sessions = self.sessions
        if sessions:
            sessions = (*sessions[:-1], replace(sessions[-1], state="interrupted", reason=reason))
        return replace(self, state="interrupted", reason=reason, sessions=sessions)


def now() -> str:
    """The present second in ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_status(run: Path, status: Status) -> None:
    """Replace ``status.json`` of ``run``."""
    body = {"format": FORMAT} | vars(status)
    body["process"] = status.process and status.process.to_json()
    body["sessions"] = [vars(session) for session in status.sessions]
    write_json(run / NAME, body)


def read_status(run: Path) -> Status:
    """The status of ``run``, settled: a dead process's ``running`` reads as ``interrupted``.

    Raises ``UserError`` if the file is missing, unreadable, or of a newer format.
    """
    path = run / NAME
    try:
        with clear_errors(path, "read"):
            body = json.loads(path.read_text(encoding="utf-8"))
        version = body.pop("format")
        if version > FORMAT:
            raise UserError(
                f"{run} has run format {version}, and this cllm reads up to {FORMAT}: update cllm"
            )
        body["process"] = Process.from_json(body["process"])
        body["sessions"] = tuple(Session(**session) for session in body["sessions"])
        status = Status(**body)
        assert status.state in get_args(State)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
        raise UserError(
            f"{path} is damaged; replace its contents by {json.dumps(_blank())} to go on with the run"
        ) from None
    return status.settled()


def _blank() -> dict[str, Any]:
    return {"format": FORMAT, "state": "interrupted", "process": None, "sessions": []}
