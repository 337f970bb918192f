"""``NAME.cllm``: a compressed model in one file, which is all that is needed to generate and to score.

The file is a safetensors file. Its metadata has one entry, ``cllm-container``: a SHA-256, a space, and the
header that it is of, as JSON: the version, the configuration, where the model comes from, how each weight
is stored, and a SHA-256 of every tensor's bytes. Tensors are read, and checked, when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cllm.core.atomic import clear_errors, new_file
from cllm.core.errors import UserError

FORMAT = "cllm-container"
VERSION = 1
SUFFIX = ".cllm"
TOKENIZER = "tokenizer"

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""For each older version, the function that turns its header into that of the next one."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How one parameter is stored.

    Attributes:
        kind: ``plain`` (a tensor as it is), ``grid`` (packed integers, scales, offsets), ``gguf-q4_0`` or
            ``gguf-q8_0`` (llama.cpp's blocks), ``coded`` (entropy-coded points), ``fixed`` (indices
            of a codebook of lattice points), ``sparse`` (the entries that pruning left), ``table`` (a
            codec's bytes).
        shape: of the parameter.
        facts: what the kind needs to be read, JSON values.
    """

    kind: str
    shape: tuple[int, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Numbers of the parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a container says about itself.

    ``config``: the configuration as TOML, without the places of its text. ``source``: the run it was made
    of (name, step, SHA-256 of its weights). ``method``: the settings of compression. ``results``:
    figures that were measured when it was made.
    """

    config: str
    source: dict[str, Any]
    method: dict[str, Any]
    weights: dict[str, Stored]
    results: dict[str, Any] = field(default_factory=dict)


def tensor_name(weight: str, part: str) -> str:
    """The name of a part of a weight in the file."""
    return f"{weight}:{part}" if part else weight


def write_container(
    path: Path, header: Header, tensors: Mapping[str, Tensor], tokenizer: str
) -> int:
    """Write a container, whole or not at all; returns its bytes.

    ``tensors`` by ``tensor_name``; ``tokenizer`` is the JSON of ``tokenizer.json``, stored compressed.
    Raises ``UserError`` if the disk refuses.
    """
    packed = lzma.compress(tokenizer.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    whole[TOKENIZER] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    body = {
        "version": VERSION,
        **asdict(header),
        "digests": {name: _digest(tensor) for name, tensor in whole.items()},
    }
    text = json.dumps(body, separators=(",", ":"))
    # One entry: safetensors writes several in no fixed order, and the same model is to be the same bytes.
    metadata = {FORMAT: f"{_sha256(text.encode('utf-8'))} {text}"}
    data = save(whole, metadata=metadata)
    with new_file(path) as file:
        file.write(data)
    return len(data)


class Container:
    """An open container. Tensors are mapped from the file and checked as they are read."""

    def __init__(self, path: Path, header: Header, digests: dict[str, str], file: Any) -> None:
        self.path, self.header = path, header
        self._digests, self._file = digests, file

    @classmethod
    def open(cls, path: str | Path) -> Container:
        """Open the container at ``path`` and check its header.

        Raises ``UserError`` for one that is missing, cut short, altered, of a newer version, or no
        container at all.
        """
        path = Path(path)
        with clear_errors(path, "read"), path.open("rb"):
            pass
        try:
            file = safe_open(path, framework="pt")
            metadata = file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{path} is no compressed model, or is damaged or cut short: make it anew with "
                "`cllm compress`"
            ) from error
        if FORMAT not in metadata:
            raise UserError(
                f"{path} is no compressed model of cllm (a safetensors file of another kind)"
            )
        claimed, _, text = metadata[FORMAT].partition(" ")
        if _sha256(text.encode("utf-8")) != claimed:
            raise _damaged(path, "its header was altered")
        body = _migrated(json.loads(text), path)
        digests = body.pop("digests")
        if set(file.keys()) != set(digests):
            raise _damaged(path, "tensors are missing or have other names")
        weights = {
            name: Stored(kind=w["kind"], shape=tuple(w["shape"]), facts=w["facts"])
            for name, w in body.pop("weights").items()
        }
        body.pop("version")
        return cls(path, Header(weights=weights, **body), digests, file)

    def tensor(self, weight: str, part: str = "") -> Tensor:
        """A part of a weight as it is stored. Raises ``UserError`` where its bytes are not as written."""
        name = tensor_name(weight, part)
        if name not in self._digests:
            raise _damaged(self.path, f"it has no {name}")
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise _damaged(self.path, f"{name} cannot be read") from error
        if _digest(tensor) != self._digests[name]:
            raise _damaged(self.path, f"{name} was altered")
        return tensor

    def has(self, weight: str, part: str = "") -> bool:
        """Whether the file has this part."""
        return tensor_name(weight, part) in self._digests

    def tokenizer(self) -> str:
        """The tokenizer's JSON."""
        try:
            return lzma.decompress(self.tensor(TOKENIZER).numpy().tobytes()).decode("utf-8")
        except (lzma.LZMAError, UnicodeDecodeError) as error:
            raise _damaged(self.path, "its tokenizer cannot be unpacked") from error

    def verify(self) -> None:
        """Read and check every tensor. Raises ``UserError`` for the first that is not as written."""
        for name in self._digests:
            self.tensor(name)

    def sizes(self) -> dict[str, int]:
        """Bytes of every weight's parts in the file, by the weight's name."""
        found: dict[str, int] = {}
        for name in self._digests:
            part = self._file.get_slice(name)
            width = _WIDTHS[part.get_dtype()]
            weight = name.partition(":")[0]
            found[weight] = found.get(weight, 0) + width * math.prod(part.get_shape())
        return found

    @property
    def bytes(self) -> int:
        """Bytes of the whole file."""
        return self.path.stat().st_size

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.weights)


_WIDTHS = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}


def is_container(path: str | Path) -> bool:
    """Whether ``path`` is to be opened as a container: a file, or a name that ends like one."""
    path = Path(path)
    return path.is_file() or (path.suffix == SUFFIX and not path.is_dir())


def _digest(tensor: Tensor) -> str:
    kind = f"{tensor.dtype}{tuple(tensor.shape)}".encode("ascii")
    flat = tensor.contiguous().view(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return _sha256(kind + data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged ({what}): make it anew with `cllm compress`")


def _migrated(body: dict[str, Any], path: Path) -> dict[str, Any]:
    version = body["version"]
    if version > VERSION:
        raise UserError(
            f"{path} has version {version}, and this cllm reads up to {VERSION}: update cllm"
        )
    while version < VERSION:
        body, version = MIGRATIONS[version](body), version + 1
    return body
