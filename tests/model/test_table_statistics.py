"""The statistics of a table are those of the hidden states and the tokens."""

from __future__ import annotations

import numpy as np
import torch

import cllm
from cllm.model.table_statistics import table_statistics
from cllm.text.batches import evaluation_windows
from cllm.text.dataset import load_prepared


def test_moment_and_frequency(trained):
    run = cllm.load(trained)
    tokens = load_prepared(run.directory.data).train
    found = table_statistics(run.model, tokens, limit=300, batch_size=4)
    ids, targets = next(iter(evaluation_windows(tokens, run.config.model.context, 8)))
    with torch.no_grad():
        hidden = run.model.hidden(torch.as_tensor(ids)).flatten(0, 1).double().numpy()
    assert (targets >= 0).all()
    assert np.allclose(found.moment, hidden.T @ hidden / len(hidden), rtol=1e-4)
    assert found.frequency.sum() == len(tokens)
    assert found.frequency[int(tokens.ids[0])] >= 1
