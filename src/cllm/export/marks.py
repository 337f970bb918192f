"""By what an export is known as one of ours, so that ``--force`` replaces nothing else.

Other programs write files of the same formats, directories with the same names in them, and people put
their own files beside. Each export holds a mark; a directory may hold what its format writes and no more.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from cllm.core.errors import UserError
from cllm.export.formats import Format, format_of

MARK = "cllm.export"
"""A key of a GGUF file, a file in an archive of torch, a fact in safetensors."""
PRODUCER = "cllm"
"""Of ONNX graphs."""
HEAD = 4096
"""Bytes at a file's beginning in which its mark stands."""


def obstacle(place: Path, target: Format) -> str:
    """Why ``place`` is not known to be an export to ``target`` by cllm; empty if it is one, or an empty
    directory."""
    if place.is_dir():
        names = sorted(path.name for path in place.iterdir())
        if not names:
            return ""
        foreign = [name for name in names if name not in target.entries]
        if foreign:
            return f"it holds {foreign[0]}"
    try:
        if format_of(place).name != target.name:
            return "it is of another format"
        marked = _is_marked(place, target)
    except (UserError, OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile):
        marked = False
    return "" if marked else "nothing in it says that cllm made it"


def _is_marked(place: Path, target: Format) -> bool:
    if target.name == "hf":
        with (place / "model.safetensors").open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, 2**26)))
        return MARK in header["__metadata__"]
    if target.name == "onnx":
        wanted = bytes([0x12, len(PRODUCER)]) + PRODUCER.encode()  # field 2 of protobuf, a string
        return wanted in _head(place / "model.onnx")[:64]
    if target.name == "gguf":
        return MARK.encode() in _head(place)
    with zipfile.ZipFile(place) as archive:
        names = archive.namelist()
        if any(name.endswith(f"/extra/{MARK}") for name in names):
            return True
        facts = [name for name in names if name.endswith("_metadata.json")]
        return any(MARK in json.loads(archive.read(name)) for name in facts)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)
