"""``state.json`` of a checkpoint: the training state, and what tells whole files from damaged ones.

It holds the SHA-256 and size of every other file of the checkpoint, and a SHA-256 of its own body.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.core.atomic import clear_errors
from cllm.core.errors import UserError

FORMAT = 1
"""The version of the checkpoint format that is written."""

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""For each older format, the function that turns its body into that of the next one."""

NAME = "state.json"


class DamagedCheckpointError(UserError):
    """A checkpoint is not as it was written; ``file`` is what is wrong."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__(f"{file} {what}")
        self.file = file
        self.what = what


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What a file must be: SHA-256 as 64 hexadecimal digits, and size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of ``state.json``."""

    step: int
    best: bool
    """Whether this was the best checkpoint of the run when it was saved."""
    files: dict[str, FileFacts] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    """What the trainer keeps: any JSON."""


def file_facts(path: Path) -> FileFacts:
    """SHA-256 and size of the file at ``path``."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileFacts(sha256=digest, bytes=path.stat().st_size)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``state.json`` into ``directory`` (a temporary one: this is not atomic by itself)."""
    body = {
        "format": FORMAT,
        "step": manifest.step,
        "best": manifest.best,
        "files": {name: vars(facts) for name, facts in manifest.files.items()},
        "state": manifest.state,
    }
    body = json.loads(json.dumps(body))  # as it will be read back: keys are strings, tuples lists
    text = json.dumps({"checksum": _checksum(body)} | body, indent=1)
    (directory / NAME).write_text(text + "\n", encoding="utf-8", newline="\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and check ``state.json`` of a checkpoint.

    Raises ``DamagedCheckpointError`` if it is missing or altered, ``UserError`` if its format is newer
    than this program.
    """
    path = directory / NAME
    try:
        with clear_errors(path, "read"):
            text = path.read_text(encoding="utf-8")
        body = json.loads(text)
        claimed = body.pop("checksum")
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise DamagedCheckpointError(path, "is missing") from None
        raise
    except (ValueError, AttributeError, KeyError) as error:
        raise DamagedCheckpointError(path, "is truncated or altered") from error
    if not text.endswith("\n"):  # as it was written: what is cut off goes first
        raise DamagedCheckpointError(path, "is truncated")
    if claimed != _checksum(body):
        raise DamagedCheckpointError(path, "was altered (its checksum does not fit its contents)")
    body = _migrated(body, path)
    files = {name: FileFacts(**facts) for name, facts in body["files"].items()}
    return Manifest(step=body["step"], best=body["best"], files=files, state=body["state"])


def check_files(directory: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Raise ``DamagedCheckpointError`` unless the files ``names`` (default: all) are as written."""
    for name in manifest.files if names is None else names:
        path, facts = directory / name, manifest.files[name]
        try:
            with clear_errors(path, "read"):
                size = path.stat().st_size
                if size != facts.bytes:
                    raise DamagedCheckpointError(
                        path, f"is damaged ({size:,} bytes, not the {facts.bytes:,} written)"
                    )
                digest = file_facts(path).sha256
        except UserError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise DamagedCheckpointError(path, "is missing") from None
            raise
        if digest != facts.sha256:
            raise DamagedCheckpointError(
                path, "is damaged (its SHA-256 is not the one in state.json)"
            )


def _checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _migrated(body: dict[str, Any], path: Path) -> dict[str, Any]:
    version = body["format"]
    if version > FORMAT:
        raise UserError(
            f"{path} has checkpoint format {version}, and this cllm reads up to {FORMAT}: update cllm"
        )
    while version < FORMAT:
        body, version = MIGRATIONS[version](body), version + 1
    return body
