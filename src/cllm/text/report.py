"""What a run says of its data: a JSON-able record of corpus, splits and tokenizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SplitReport:
    """One split. ``scored_*`` is what the loss counts on (all of it unless records have prompts)."""

    segments: int
    """Documents, or parts of them where blocks are held out."""
    bytes: int
    tokens: int
    """Ids in the file, end tokens and the leading one among them."""
    scored_bytes: int
    scored_tokens: int
    bytes_per_token: float


@dataclass(frozen=True)
class DuplicateReport:
    """Near-duplicates of held-out text in the training text."""

    action: str
    """report, drop or off."""
    checked: int = 0
    """Held-out documents (or groups of some 200 words) that were looked for."""
    checked_bytes: int = 0
    found: int = 0
    """Held-out ones with a near-duplicate in training."""
    found_bytes: int = 0
    dropped: int = 0
    """Training ones left out for it."""
    dropped_bytes: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class CorpusReport:
    """Everything that ``prepare`` found out and decided."""

    sources: tuple[dict[str, Any], ...]
    """Name, bytes as stored and SHA-256 of each (the first hundred)."""
    source_count: int
    sha256: str
    """Of the decoded corpus: all documents in order."""
    bytes: int
    documents: int
    split: str
    """document or block."""
    splits: dict[str, SplitReport]
    bytes_per_token: float
    """Over all splits."""
    vocab_asked: int | None
    """None for a tokenizer that was given."""
    vocab_size: int
    tokenizer_sha256: str
    sample_bytes: int
    """Bytes of training text that the tokenizer was trained on."""
    duplicates: DuplicateReport
    notes: tuple[str, ...]
    """Remarks from reading: byte order marks, record templates."""

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; ``from_json`` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CorpusReport:
        """From what ``to_json`` gave, after a trip through JSON."""
        value = dict(value)
        duplicates = dict(value["duplicates"])
        duplicates["examples"] = tuple(duplicates["examples"])
        value["duplicates"] = DuplicateReport(**duplicates)
        value["splits"] = {name: SplitReport(**split) for name, split in value["splits"].items()}
        value["sources"], value["notes"] = tuple(value["sources"]), tuple(value["notes"])
        return cls(**value)

    def lines(self) -> list[str]:
        """A few lines for people."""
        lines = [
            f"corpus: {self.bytes:,} bytes in {self.documents:,} documents of {self.source_count:,} "
            f"source{'s' * (self.source_count != 1)}, sha256 {self.sha256[:12]}",
            f"tokenizer: {self.vocab_size:,} tokens, {self.bytes_per_token:.2f} bytes per token",
        ]
        for name, split in self.splits.items():
            lines.append(
                f"{name}: {split.bytes:,} bytes, {split.tokens:,} tokens (by {self.split})"
            )
        if self.vocab_asked is not None and self.vocab_size < self.vocab_asked:
            lines.append(
                f"the text holds fewer repeated pairs than a vocabulary of {self.vocab_asked:,} needs: "
                f"it has {self.vocab_size:,} tokens"
            )
        found = self.duplicates
        if found.found:
            lines.append(
                f"near-duplicates: {found.found:,} of {found.checked:,} held-out pieces nearly repeat "
                f"training text ({found.found_bytes:,} bytes)"
                + (f"; {found.dropped:,} dropped from training" if found.dropped else "")
            )
        return lines + list(self.notes)
