"""Prepared data: the directory that ``prepare`` writes and everything after it opens.

``tokenizer.json``, one packed file for each split, and ``prepared.json``, which is written last: a
directory without it is not prepared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from cllm.core.atomic import write_json
from cllm.core.errors import UserError
from cllm.text.packed import PackedTokens
from cllm.text.report import CorpusReport
from cllm.text.tokenizer import Tokenizer

FORMAT = 1
MANIFEST = "prepared.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A tokenizer and the packed splits; ``validation`` or ``test`` is ``None`` where its share is 0."""

    tokenizer: Tokenizer
    train: PackedTokens
    validation: PackedTokens | None
    test: PackedTokens | None
    report: CorpusReport


def packed_path(directory: Path, split: str) -> Path:
    """Where a split lies."""
    return directory / f"{split}.tokens"


def tokens_key(request: str, tokenizer: Tokenizer) -> str:
    """The key in the packed files' headers, from the request's key and the tokenizer."""
    return hashlib.sha256(f"{request}:{tokenizer.sha256}".encode("ascii")).hexdigest()


def write_manifest(directory: Path, key: str, report: CorpusReport) -> None:
    """Declare ``directory`` prepared for the request ``key`` (hex)."""
    content = {"format": FORMAT, "key": key, "report": report.to_json()}
    write_json(directory / MANIFEST, content)


def prepared_key(directory: Path) -> str | None:
    """The request's key of a prepared directory; ``None`` if it is not prepared (in this format)."""
    try:
        content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return str(content["key"]) if content["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_prepared(directory: str | Path) -> Dataset:
    """Open what ``prepare`` wrote, without its sources.

    Raises ``UserError`` naming the file that is missing, truncated, altered or of other data.
    """
    directory = Path(directory)
    key = prepared_key(directory)
    if key is None:
        raise UserError(
            f"{directory} holds no prepared data ({MANIFEST} is missing, altered or of another version)"
        )
    content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    try:
        report = CorpusReport.from_json(content["report"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory / MANIFEST} was altered; prepare the data anew") from error
    tokenizer = Tokenizer.load(directory / TOKENIZER)
    if tokenizer.sha256 != report.tokenizer_sha256:
        raise UserError(f"{directory / TOKENIZER} was altered; prepare the data anew")
    opened = {
        name: PackedTokens.open(packed_path(directory, name), key=tokens_key(key, tokenizer))
        for name in SPLITS
        if name in report.splits
    }
    return Dataset(tokenizer, opened["train"], opened.get("validation"), opened.get("test"), report)
