"""An exported torch file in a fresh process, which does not import cllm (``outside.py``)."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from cllm.core.errors import UserError
from cllm.export.runtime import Runtime

PROGRAM = Path(__file__).with_name("outside.py")


def open_fresh(kind: str, path: Path) -> Runtime:
    """The file in a process of its own; ``UserError`` if it cannot be loaded there."""
    child = _Child(kind, path)
    name = f"torch {torch.__version__} (a process without cllm)"
    return Runtime(name, child.logits, close=child.close)


class _Child:
    def __init__(self, kind: str, path: Path) -> None:
        self.path = path
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        # -I: neither PYTHONPATH nor the working directory is looked at.
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(PROGRAM), kind, str(path.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"ready\n":
            self._fail("cannot be loaded")

    def logits(self, ids_bt: np.ndarray) -> np.ndarray:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(" ".join(map(str, ids_bt.shape)).encode("ascii") + b"\n")
            self.process.stdin.write(ids_bt.astype(np.int64).tobytes())
            self.process.stdin.flush()
            sizes = [int(size) for size in self.process.stdout.readline().split()]
        except OSError:
            sizes = []
        if not sizes:
            self._fail(f"gives no logits for ids of shape {ids_bt.shape}")
        data = self.process.stdout.read(4 * math.prod(sizes))
        return np.frombuffer(data, dtype=np.float32).reshape(sizes).copy()

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self.process.wait()
        self.errors.close()

    def _fail(self, what: str) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode("utf-8", "replace").strip().splitlines()
        self.close()
        raise UserError(f"{self.path} {what} without cllm: {lines[-1] if lines else 'it ended'}")
