"""A document: a name, a text, and the ranges of it that the loss counts on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One document, or one piece of a long one.

    ``spans`` are ascending, disjoint (start, end) character ranges that the loss counts on (the
    answers of prompt/completion and chat records); ``None`` means everything. A file that is too
    long for one string arrives as several pieces of the same name: all but the first have
    ``continues`` set. Pieces carry no spans.
    """

    name: str
    text: str
    spans: tuple[tuple[int, int], ...] | None = None
    continues: bool = False

    def __post_init__(self) -> None:
        assert self.spans is None or not self.continues, "a piece carries no spans"
        last = 0
        for start, end in self.spans or ():
            assert last <= start <= end <= len(self.text), f"spans of {self.name}: {self.spans}"
            last = end
