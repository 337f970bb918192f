"""Compressed weights on disk while a model is being compressed, so that it can be gone on with."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cllm.compress.layer import Piece
from cllm.core.atomic import clean_leftovers, clear_errors, new_file, write_text
from cllm.store.container import Stored

_VALUES = "values"


class PartsFolder:
    """A directory beside the file to be made, keyed by all that decides what its pieces are.

    Pieces of another key are removed; ``remove`` ends it. Raises ``UserError`` if the disk refuses.
    """

    def __init__(self, target: Path, key: str) -> None:
        self.path = target.with_name(f"{target.name}.parts")
        mark = self.path / "key"
        with clear_errors(self.path):
            if self.path.is_dir() and not (mark.is_file() and mark.read_text("ascii") == key):
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            clean_leftovers(self.path)
            if not mark.is_file():
                write_text(mark, key)

    def load(self, name: str) -> Piece | None:
        """The piece of a weight, or ``None`` if it is not there, whole."""
        try:
            with safe_open(self._file(name), framework="pt") as file:
                facts = json.loads(file.metadata()["piece"])
                tensors = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None
        values = tensors.pop(_VALUES)
        stored = facts["stored"]
        stored = Stored(kind=stored["kind"], shape=tuple(stored["shape"]), facts=stored["facts"])
        parts = {part.removeprefix("part:"): tensor for part, tensor in tensors.items()}
        return Piece(stored, parts, values, facts["figures"])

    def save(self, name: str, piece: Piece) -> None:
        """Keep the piece of a weight."""
        facts = json.dumps({"stored": asdict(piece.stored), "figures": piece.figures})
        tensors = {f"part:{part}": tensor.contiguous() for part, tensor in piece.parts.items()}
        tensors[_VALUES] = piece.values.contiguous().clone()
        with new_file(self._file(name)) as file:
            file.write(save(tensors, metadata={"piece": facts}))

    def remove_if_empty(self) -> None:
        """Delete the directory where no piece was kept: there is nothing to go on from."""
        if not any(self.path.glob("*.safetensors")):
            self.remove()

    def remove(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"
