"""An exported GGUF file in llama.cpp, by the package ``llama-cpp-python``."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cllm.core.errors import UserError
from cllm.export.gguf_blocks import gguf_package
from cllm.export.gguf_reading import broken
from cllm.export.llama_library import F32, hush
from cllm.export.runtime import Runtime

ALONE = Path(__file__).with_name("llama_alone.py")


class IllegalInstructionError(UserError):
    """llama.cpp would end this process by an instruction that is illegal here."""


def open_llama_cpp(path: Path) -> Runtime:
    """The file at ``path``, its cache in float32.

    Raises ``ModuleNotFoundError`` without llama-cpp-python, ``IllegalInstructionError``, and
    ``UserError`` where it refuses the file or ends by it.
    """
    llama_cpp = importlib.import_module("llama_cpp")
    kind, context = _facts(path)
    _try_alone(path, context, llama_cpp.__version__)
    hush(llama_cpp)
    try:
        model = llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_batch=context,
            # Its threads spin for one another: on a machine with other work two are slower than one.
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=F32,
            type_v=F32,
            verbose=False,
        )
    except Exception as error:  # a ValueError, and assertions of its own
        raise UserError(f"llama.cpp cannot load {path}: {error}") from error
    name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
    caller = _Caller(model)
    # On F16, BF16 and blocks llama.cpp rounds activations, too, before it multiplies.
    return Runtime(name, caller.logits, caller.encode, exact=kind == "ALL_F32")


def _try_alone(path: Path, context: int, version: str) -> None:
    """Have another process ask it first: of llama-cpp-python 0.3.36, built on a machine with AMX, integers
    of 4 and 8 bits were an illegal instruction. What it merely refuses is met again here."""
    call = [sys.executable, str(ALONE), str(path.resolve()), str(context)]
    found = subprocess.run(call, capture_output=True, env=os.environ | {"PYTHONSAFEPATH": "1"})
    if found.returncode >= 0:
        return
    name, who = signal.Signals(-found.returncode).name, f"llama.cpp (llama-cpp-python {version})"
    if name == "SIGILL":
        raise IllegalInstructionError(
            f"{who} ends by {name} on this machine, alone as well: build it with fewer of this processor's "
            "instructions, or another version"
        )
    lines = found.stderr.decode("utf-8", "replace").strip().splitlines()
    raise UserError(f"{who} ends by {name} over {path}{f': {lines[-1]}' if lines else ''}")


class _Caller:
    """One sequence after the other: llama.cpp is asked for all logits of each."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, ids_bt: np.ndarray) -> np.ndarray:
        rows = []
        for ids in ids_bt:
            self.model.reset()
            self.model.eval(ids.tolist())
            rows.append(np.array(self.model.scores[: len(ids)], dtype=np.float32))
        return np.stack(rows)

    def encode(self, text: str) -> list[int]:
        return list(self.model.tokenize(text.encode("utf-8"), add_bos=True, special=False))


def _facts(path: Path) -> tuple[str, int]:
    """(the file's type, its context)."""
    gguf = gguf_package()
    try:
        fields = gguf.GGUFReader(path).fields
        kind = gguf.LlamaFileType(fields["general.file_type"].contents()).name
        return kind, int(fields["llama.context_length"].contents())
    except Exception as error:  # numpy's and struct's, which tell of reshaping and offsets
        raise UserError(broken(path)) from error
