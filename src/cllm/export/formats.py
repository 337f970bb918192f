"""The formats by name: where each is written and opened, and what it can store.

No module of a format is imported before it is asked for: some need packages that are extras.
"""

from __future__ import annotations

import importlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from cllm.core.atomic import clear_errors
from cllm.core.errors import UsageError, UserError, nearest
from cllm.export.runtime import Runtime
from cllm.export.source import Source
from cllm.model.transformer import Transformer


class FormatModule(Protocol):
    """What the module of a format offers."""

    def write(self, source: Source, dtype: str, path: Path) -> Transformer:
        """Write to ``path``, where nothing stands; returns the model with the weights as stored."""

    def open_runtime(self, path: Path) -> Runtime:
        """Open the file in its own program. Raises ``UserError``."""


@dataclass(frozen=True)
class Format:
    """A format, as ``--to`` names it."""

    name: str
    module: str
    suffix: str
    """Of the file's name; a directory's is a tag."""
    dtypes: tuple[str, ...]
    """Precisions of the weights, the default first."""
    directory: bool = False
    ending: str = ""
    """What a file's name must end in, where its program goes by that."""
    note: str = ""
    """What one should know before choosing it."""
    checked_by: str = ""
    """The package that a check needs, of the extra that is called as the format is."""
    entries: tuple[str, ...] = ()
    """What a directory holds."""

    def load(self) -> FormatModule:
        """The module that writes and opens it."""
        return cast(FormatModule, importlib.import_module(f"cllm.export.{self.module}"))


TORCHSCRIPT = "torch 2.13 calls TorchScript deprecated: prefer torch-export where you can"

FORMATS = {
    made.name: made
    for made in (
        Format(
            "hf",
            "hf",
            "-hf",
            ("fp32", "bf16", "fp16"),
            directory=True,
            checked_by="transformers",
            entries=(
                "README.md",
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
            ),
        ),
        Format("gguf", "gguf", ".gguf", ("f32", "f16", "bf16", "q8_0", "q4_0"), checked_by="gguf"),
        Format(
            "onnx",
            "onnx",
            "-onnx",
            ("fp32", "int8", "int4"),
            directory=True,
            checked_by="onnxruntime",
            entries=("model.onnx", "model-cached.onnx", "tokenizer.json"),
        ),
        Format("torch-export", "torch_program", ".pt2", ("fp32",), ending=".pt2"),
        Format("aoti", "aoti", "-aoti.pt2", ("fp32",), ending=".pt2"),
        Format("torchscript", "torchscript", ".pt", ("fp32",), note=TORCHSCRIPT),
    )
}


def find_format(name: str) -> Format:
    """The format called ``name``; ``UsageError`` with the nearest name if there is none."""
    if name not in FORMATS:
        known = list(FORMATS)
        raise UsageError(
            f"unknown format {name!r}{nearest(name, known)}; known: {', '.join(known)}"
        )
    return FORMATS[name]


def find_dtype(target: Format, dtype: str | None) -> str:
    """``dtype`` if ``target`` stores it, its default if none is given; else ``UsageError``."""
    if dtype is None:
        return target.dtypes[0]
    if dtype not in target.dtypes:
        raise UsageError(f"{target.name} has no dtype {dtype!r}; known: {', '.join(target.dtypes)}")
    return dtype


def format_of(path: Path) -> Format:
    """The format of an exported file or directory, by what is in it. Raises ``UserError``."""
    if not path.exists():
        raise UserError(f"there is no exported file {path}")
    if path.is_dir():
        return _directory_format(path)
    with clear_errors(path, "read"), path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise UserError(f"{path} is empty; export anew")
    if head == b"GGUF":
        return FORMATS["gguf"]
    if head == b"PK\x03\x04":
        return _archive_format(path)
    raise UserError(f"{path} is none of the formats that cllm exports: {', '.join(FORMATS)}")


def _archive_format(path: Path) -> Format:
    """By the names in a zip file, as torch writes all of its formats."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = archive.infolist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is broken or cut short: {error}") from error
    if min((entry.header_offset for entry in found), default=-1) != 0:
        # The directory is that of an archive within it: its own is gone.
        raise UserError(f"{path} is broken or cut short; export anew")
    names = ["/".join(entry.filename.split("/")[1:]) for entry in found]
    if any(name.startswith("data/aotinductor/") for name in names):
        return FORMATS["aoti"]
    if any(name.startswith("models/") for name in names):
        return FORMATS["torch-export"]
    if any(name.startswith("code/") for name in names):
        return FORMATS["torchscript"]
    raise UserError(f"{path} is none of the formats that cllm exports: {', '.join(FORMATS)}")


def _directory_format(path: Path) -> Format:
    if (path / "model.onnx").is_file():
        return FORMATS["onnx"]
    config = path / "config.json"
    with clear_errors(config, "read"):
        try:
            text = config.read_text(encoding="utf-8") if config.exists() else "{}"
            known = isinstance(json.loads(text).get("architectures"), list)
        except (ValueError, AttributeError) as error:
            raise UserError(f"{config} is not JSON, or cut short; export anew") from error
    if known:
        return FORMATS["hf"]
    raise UserError(f"{path} is a directory that `cllm export` did not make")
