"""``hf:NAME``: a data set of the Hugging Face hub, through the optional package ``datasets``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cllm.core.errors import UsageError, UserError, require
from cllm.text.document import Document
from cllm.text.fingerprint import Fingerprint
from cllm.text.notes import Notes
from cllm.text.records import record_document

PREFIX = "hf:"


@dataclass(frozen=True)
class HubSource:
    """``hf:NAME[@CONFIGURATION][:SPLIT]``; the split is ``train`` if none is given."""

    name: str
    dataset: str
    configuration: str | None
    split: str

    @classmethod
    def parse(cls, path: str) -> HubSource:
        """Raises ``UsageError`` if no name follows ``hf:``."""
        name, _, split = path.removeprefix(PREFIX).partition(":")
        name, _, configuration = name.partition("@")
        if not name:
            raise UsageError(f"{path!r} names no data set; write hf:NAME or hf:NAME:SPLIT")
        return cls(path, name, configuration or None, split or "train")

    def _load(self) -> Any:
        """The rows, kept by ``datasets`` in its own cache on disk and mapped, not held in memory."""
        datasets = require("datasets", "hf", f"reading {self.name}")
        try:
            return datasets.load_dataset(self.dataset, self.configuration, split=self.split)
        except Exception as error:  # offline, unknown name, unknown split: each a type of its own
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"cannot load {self.name}: {reason or type(error).__name__}") from error

    def fingerprint(self) -> Fingerprint:
        """Bytes and SHA-256 of the rows as JSON lines."""
        digest, size = hashlib.sha256(), 0
        for row in self._load():
            line = json.dumps(row, sort_keys=True, default=str).encode("utf-8") + b"\n"
            digest.update(line)
            size += len(line)
        return Fingerprint(self.name, size, digest.hexdigest())

    def documents(self, field: str, notes: Notes) -> Iterator[Document]:
        """One document a row; rows are read as JSONL records are."""
        for number, row in enumerate(self._load()):
            yield record_document(row, f"{self.name}[{number}]", field, notes)
