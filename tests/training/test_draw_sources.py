"""What a run's steps draw from is what its settings say, counted in its training split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm.core.config import Config
from cllm.store.run import RunDirectory
from cllm.text.counts import count_tokens
from cllm.text.dataset import Dataset, load_prepared
from cllm.training.candidates import log_uniform, unigram
from cllm.training.draw_sources import draws_of
from cllm.training.draws import Draws
from cllm.training.progress import Silent

CHANCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uniform": lambda counts: np.full(len(counts), 1 / len(counts)),
    "log-uniform": log_uniform,
    "unigram": unigram,
    "divisor": unigram,
}


@pytest.fixture
def drawn(trained: Path, config_of: Callable[..., Config]) -> Callable[..., tuple[Draws, Dataset]]:
    """Makes what the steps of a run on the corpus draw from, with settings changed."""
    dataset = load_prepared(RunDirectory.open(trained).data)

    def make(**changes: Any) -> tuple[Draws, Dataset]:
        size = dataset.tokenizer.vocab_size
        return draws_of(config_of(model__vocab_size=size, **changes), dataset, Silent()), dataset

    return make


def test_without_either_nothing_is_drawn(drawn: Callable[..., tuple[Draws, Dataset]]) -> None:
    found, _ = drawn()
    assert (found.sampler, found.pairs) == (None, None)


@pytest.mark.parametrize("sampler", list(CHANCES))
def test_chances_are_those_of_the_sampler(
    sampler: str, drawn: Callable[..., tuple[Draws, Dataset]]
) -> None:
    settings = {"train__loss": "sampled", "train__sampled__candidates": 20}
    found, dataset = drawn(**settings, train__sampled__sampler=sampler)
    assert found.sampler is not None
    counts = count_tokens(dataset.train, dataset.tokenizer.vocab_size)
    np.testing.assert_allclose(found.sampler.probabilities, CHANCES[sampler](counts))
    assert found.sampler.size == 20
    assert (found.sampler.neighbours is not None) == (sampler == "divisor")
    ids, expected = found.sampler.draw(0, np.arange(40))
    assert len(ids) == len(expected) == 20
    assert found.estimates


def test_lists_are_as_long_as_each_use_asks(drawn: Callable[..., tuple[Draws, Dataset]]) -> None:
    found, _ = drawn(
        train__loss="sampled",
        train__sampled__candidates=20,
        train__sampled__sampler="divisor",
        train__sampled__neighbours=3,
        train__sampled__share=0.25,
        train__similarity__weight=1.0,
        train__similarity__neighbours=5,
        train__similarity__pairs=64,
    )
    assert found.sampler is not None
    assert found.sampler.neighbours is not None
    assert found.pairs is not None
    assert found.sampler.neighbours.ids.shape[1] == 3
    assert found.sampler.share == 0.25
    assert found.pairs.neighbours.ids.shape[1] == 5
    assert np.array_equal(found.pairs.neighbours.ids[:, :3], found.sampler.neighbours.ids)
    pairs, alike = found.pairs.draw(0)
    assert pairs.shape == (2, 64)
    assert (alike > 0).all()
