"""An index on disk: a directory of .npy files and a description with their checksums."""

from __future__ import annotations

import json
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from cllm.core.atomic import clear_errors, new_directory, write_json
from cllm.core.errors import UserError
from cllm.infer.lookup.metric import Rows
from cllm.infer.lookup.regions import Regions, block_edges, head_size

FORMAT = "cllm token index"
VERSION = 1
_LARGE = ("vectors", "head")
"""What is mapped and not read, so not summed, unless all is read."""
_DESCRIPTION = "index.json"
_BROKEN = (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError)


def save(rows: Rows, regions: Regions | None, path: Path) -> None:
    """Write a directory at ``path``, whole or not at all; an older index there is replaced.

    Raises ``UserError`` if something else stands there, or the system refuses.
    """
    if path.exists() and _described(path).get("format") != FORMAT:
        raise UserError(f"{path} is there and is no token index; choose another place")
    arrays = {field.name: getattr(rows, field.name) for field in fields(Rows)}
    if regions is not None:
        arrays |= {field.name: getattr(regions, field.name) for field in fields(Regions)}
    with new_directory(path) as directory:
        parts = {}
        for name, array in arrays.items():
            np.save(directory / f"{name}.npy", array)
            parts[name] = {"crc32": _sum(array), "shape": array.shape, "dtype": str(array.dtype)}
        body = {"format": FORMAT, "version": VERSION, "parts": parts}
        write_json(directory / _DESCRIPTION, body)


def load(path: Path, *, mmap: bool = True) -> tuple[Rows, Regions | None]:
    """Read what ``save`` wrote.

    With ``mmap`` the vectors and their leading coordinates stay on disk and are mapped (read-only); their
    checksums are then not looked at, their shapes and those of all others are. Raises ``UserError`` if
    there is none, it is of another version, or damaged.
    """
    if not path.is_dir():
        raise UserError(f"there is no token index {path}")
    body = _described(path)
    if body.get("format") != FORMAT:
        raise UserError(f"{path} is no token index (it has no readable {_DESCRIPTION})")
    if body.get("version") != VERSION:
        raise UserError(
            f"{path} is a token index of version {body.get('version')}, this is cllm for version"
            f" {VERSION}; build it again"
        )
    try:
        arrays = {name: _read(path, name, part, mmap) for name, part in body["parts"].items()}
        rows = Rows(**{field.name: arrays.pop(field.name) for field in fields(Rows)})
        regions = Regions(**arrays) if arrays else None
        _check(rows, regions)
    except _BROKEN as error:
        raise UserError(
            f"the token index {path} is damaged ({error or type(error).__name__}); build it again"
        ) from error
    return rows, regions


def _described(path: Path) -> dict[str, Any]:
    try:
        body = json.loads((path / _DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _read(path: Path, name: str, part: dict[str, Any], mmap: bool) -> np.ndarray:
    mapped = mmap and name in _LARGE
    with clear_errors(path / f"{name}.npy", "read"):
        array = np.load(path / f"{name}.npy", mmap_mode="r" if mapped else None, allow_pickle=False)
    if list(array.shape) != part["shape"] or str(array.dtype) != part["dtype"]:
        raise ValueError(f"{name}.npy holds {array.dtype} {array.shape}")
    if not mapped and _sum(array) != part["crc32"]:
        raise ValueError(f"{name}.npy fails its checksum")
    # A plain array over the mapping: slices of numpy.memmap cost microseconds each.
    return np.asarray(array)


def _sum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data)


def _check(rows: Rows, regions: Regions | None) -> None:
    """The shapes belong together; a description can be whole and made by another hand."""
    V, D = rows.vectors.shape
    expected: dict[str, tuple[int, ...]] = {"ids": (V,), "half": (V,), "inverse": (V,)}
    got = {name: getattr(rows, name).shape for name in expected}
    if regions is not None:
        C, blocks = len(regions.starts) - 1, len(block_edges(D))
        more = {
            "rotation": (D, D),
            "starts": (C + 1,),
            "centres": (2, C, D),
            "radii": (2, C, blocks),
            "variances": (2, C, blocks),
            "head": (V, head_size(D)),
            "tail": (V,),
            "offset": (V,),
        }
        got |= {f"{name} of cells": getattr(regions, name).shape for name in more}
        expected |= {f"{name} of cells": shape for name, shape in more.items()}
        edges = regions.starts
        if edges[0] != 0 or edges[-1] != V or (np.diff(edges) < 1).any():
            raise ValueError("cells that do not cover the rows")
    for name, shape in expected.items():
        if got[name] != shape:
            raise ValueError(f"{name} has shape {got[name]}, not {shape}")
    if (np.bincount(rows.ids, minlength=V) != 1).any() or len(rows.ids) != V:
        raise ValueError("ids are not all tokens once")
