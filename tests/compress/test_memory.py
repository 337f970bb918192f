"""What measuring takes of memory does not grow with the text that it is measured on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BATCH, BEFORE, AFTER = 1024, 4, 16
LOGITS = 4 * BATCH * 4096

SCRIPT = f"""
from contextlib import contextmanager
from pathlib import Path
import numpy as np
import torch
from cllm.compress.output_metric import output_metrics
from cllm.core.config import Config
from cllm.core.settings import merge
from cllm.model.transformer import Transformer

class Watched:
    @contextmanager
    def stage(self, *words):
        yield lambda count: print(4096 * int(Path("/proc/self/statm").read_text().split()[1]))

torch.set_num_threads(1)
config = merge(Config(), {{"model.preset": "mini", "model.vocab_size": 4096}}).model
model = Transformer(config)
model.start(0)
shape = {AFTER * BATCH} // config.context, config.context
output_metrics(model, np.random.default_rng(0).integers(0, 4096, shape), Watched())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_the_metric_of_outputs_takes_no_more_for_more_text() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert not found.returncode, found.stderr
    sizes = [int(line) for line in found.stdout.split()]
    assert len(sizes) == AFTER
    # It grew by two batches' logits with each batch once.
    assert max(sizes) - sizes[BEFORE - 1] < 8 * LOGITS
