"""The last layer's start: an untrained model that knows which token follows which."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from cllm.core.config import ModelConfig
from cllm.model.bigram_start import bigram_logits, linear_map, start_bigram
from cllm.model.corpus_start import corpus_table
from cllm.model.transformer import Transformer

SIZE = 30


def bigrams() -> sparse.csr_array:
    """Pairs in which each token has few, skewed successors."""
    rng = np.random.default_rng(0)
    chances = rng.gamma(0.15, size=(SIZE, SIZE)) * rng.gamma(0.5, size=SIZE)
    return sparse.csr_array(np.floor(300 * chances / chances.sum(1, keepdims=True)))


def model_of(**fields: Any) -> Transformer:
    shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 40, "context": 8}
    model = Transformer(ModelConfig(**shape | fields, vocab_size=SIZE))
    model.start(3)
    counts = bigrams()
    table = corpus_table(counts, counts.toarray().sum(0), 16, std=0.3, seed=0)
    model.embedding.set_table(torch.from_numpy(table))
    if model.head is not None:
        model.head.set_table(torch.from_numpy(table))
    return model.eval()


def loss(model: Transformer) -> float:
    """Nats of the second token of a pair, over all pairs."""
    counts = bigrams().toarray()
    with torch.no_grad():
        logits = model(torch.arange(SIZE)[:, None])[:, 0]
    chances = torch.log_softmax(logits, dim=-1).numpy()
    return float(-(counts * chances).sum() / counts.sum())


def test_smoothed_logits_are_logarithms_of_chances_up_to_a_constant() -> None:
    counts = bigrams()
    dense = counts.toarray()
    share, unigram, lifted = bigram_logits(counts)
    assert share.sum() == pytest.approx(1)
    row = dense.sum(1, keepdims=True)
    kinds = (dense > 0).sum(1, keepdims=True)
    smoothing = np.clip(kinds / (kinds + row), 0.05, 1)
    chances = (1 - smoothing) * dense / row + smoothing * share
    constant = np.log(chances) - (unigram + lifted.toarray())
    np.testing.assert_allclose(constant - constant[:, :1], 0, atol=1e-12)
    np.testing.assert_allclose(chances.sum(1), 1)


def test_the_linear_map_is_the_weighted_least_squares_solution() -> None:
    rng = np.random.default_rng(1)
    inputs, outputs, counts = rng.normal(size=(SIZE, 5)), rng.normal(size=(SIZE, 5)), bigrams()
    found = linear_map(inputs, outputs, counts)
    share, unigram, lifted = bigram_logits(counts)
    frequency = counts.sum(axis=1) / counts.sum()

    def error(candidate: np.ndarray) -> float:
        rest = inputs @ candidate @ outputs.T - unigram - lifted.toarray()
        rest -= (rest @ share)[:, None]  # the constant of each row that is free
        return float(frequency @ rest**2 @ share)

    least = error(found)
    for _ in range(20):
        assert error(found + 0.01 * rng.normal(size=(5, 5))) > least


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mlp": "gelu"},
        {"norm": "layernorm"},
        {"tie_embeddings": False},
        {"d_ff": 12},
        {"mlp": "gelu", "d_ff": 13},
    ],
    ids=str,
)
def test_an_untrained_model_predicts_bigrams(fields: dict[str, Any]) -> None:
    model, counts = model_of(**fields), bigrams().toarray()
    before = loss(model)
    assert start_bigram(model, bigrams())
    chances = counts.sum(0) / counts.sum()
    unigram = -float((counts.sum(0) * np.log(np.maximum(chances, 1e-9))).sum() / counts.sum())
    assert loss(model) < min(before, unigram) - 0.3


def test_it_is_the_same_for_the_same_model() -> None:
    one, two = model_of(), model_of()
    start_bigram(one, bigrams())
    start_bigram(two, bigrams())
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def test_batch_norm_and_no_pairs_leave_the_layers_as_they_are() -> None:
    empty = sparse.csr_array((SIZE, SIZE))
    for model, counts in ((model_of(norm="batchnorm"), bigrams()), (model_of(), empty)):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert not start_bigram(model, counts)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
