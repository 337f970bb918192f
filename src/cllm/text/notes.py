"""What reading a corpus finds out: remarks for the report, and problems that end it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from cllm.core.errors import UserError

_SHOWN = 5


@dataclass(slots=True)
class Notes:
    """Collected while sources are read, so that one error lists every file that cannot be."""

    problems: list[str] = field(default_factory=list)
    _remarks: Counter[str] = field(default_factory=Counter)
    _first: dict[str, str] = field(default_factory=dict)

    def remark(self, what: str, where: str) -> None:
        """Remember that ``what`` (a sentence) is so at ``where`` (a file or record)."""
        self._remarks[what] += 1
        self._first.setdefault(what, where)

    def problem(self, what: str) -> None:
        """Remember a file that cannot be read."""
        self.problems.append(what)

    def raise_problems(self) -> None:
        """Raise one ``UserError`` for all problems, if there are any."""
        if self.problems:
            more = len(self.problems) - _SHOWN
            tail = f"; and {more} more files" if more > 0 else ""
            raise UserError("; ".join(self.problems[:_SHOWN]) + tail)

    def lines(self) -> tuple[str, ...]:
        """The remarks, each with how often and where first."""
        return tuple(
            f"{what}: {self._first[what]}" + (f" and {count - 1:,} more" if count > 1 else "")
            for what, count in self._remarks.items()
        )
