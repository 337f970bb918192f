"""What is drawn for a micro-batch: candidates of sampled softmax, pairs of the similarity loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cllm.training.candidates import Sampler
from cllm.training.gradient import Candidates, Micro, Pairs
from cllm.training.similarity import PairSource


@dataclass(frozen=True, eq=False)
class Draws:
    """Where candidates and pairs come from; neither, and a step is on the exact loss alone."""

    sampler: Sampler | None = None
    pairs: PairSource | None = None

    @property
    def estimates(self) -> bool:
        """Whether the training loss is an estimate."""
        return self.sampler is not None

    def micro(
        self, ids: Tensor, targets: Tensor, number: int, factor: float, like: Tensor
    ) -> Micro:
        """Micro-batch ``number`` with what is drawn for it, on the device and in the precision of ``like``.

        ``factor``: of the similarity loss's gradient.
        """
        candidates = pairs = None
        if self.sampler is not None:
            drawn, expected = self.sampler.draw(number, targets.cpu().numpy().ravel())
            candidates = Candidates(_on(drawn, like), _on(np.log(expected), like, like.dtype))
        if self.pairs is not None:
            drawn, alike = self.pairs.draw(number)
            strength = torch.tensor(factor, dtype=like.dtype).to(like.device)
            pairs = Pairs(_on(drawn, like), _on(alike, like, like.dtype), strength)
        return Micro(ids, targets, candidates, pairs)


def _on(array: np.ndarray, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.from_numpy(array).to(like.device, dtype)
