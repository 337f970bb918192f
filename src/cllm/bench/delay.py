"""What a delay costs: bits per byte at equal steps, with the delayed pipeline and without.

A part of ``cllm bench parallel``: a small model on the built-in corpus, the same seed, batches and rates.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from cllm.core.config import Config
from cllm.core.settings import merge
from cllm.training.progress import Silent
from cllm.training.session import start

STEPS = 150
FIXED = {
    "model.preset": "nano",
    "tokenizer.vocab_size": 1024,
    "train.compile": "off",
    "train.dtype": "fp32",
    "train.threads": 1,
    "log.tensorboard": False,
    "log.sample_tokens": 0,
}
NAMES = {"off": "the plain loop", "delayed": "delayed pipeline"}


def measure(quick: bool, data: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of bits per byte on the validation split, and notes; nothing here is claimed."""
    steps = 4 if quick else STEPS
    rows = []
    with tempfile.TemporaryDirectory(prefix="cllm-bench-") as folder:
        for mode, name in NAMES.items():
            changes = {"train.steps": steps, "train.pipeline.mode": mode, "data.paths": data}
            outcome = start(merge(Config(), FIXED | changes), Silent(), out=Path(folder) / mode)
            assert outcome.validation is not None
            bpb = round(outcome.validation.bpb, 4)
            rows.append({"contestant": f"{name}, {steps} steps", "bits per byte": bpb})
    return rows, [f"Bits per byte: the preset nano, {steps} steps, one seed, at the same settings."]
