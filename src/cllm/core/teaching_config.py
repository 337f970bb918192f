"""The ``train.sampled.*`` and ``train.similarity.*`` settings: what training takes from other than the
exact loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cllm.core.section import NonNegative, PositiveInt, Section

Share = Annotated[float, Field(gt=0.0, lt=1.0)]


class SampledConfig(Section):
    """Sampled softmax, where ``train.loss`` is ``sampled`` (see ``docs/embeddings.md``)."""

    candidates: PositiveInt = 1024
    """Tokens drawn for each micro-batch, against which every target is scored."""
    sampler: Literal["uniform", "log-uniform", "unigram", "divisor"] = "unigram"
    """Chances of a token: equal, by its rank (Zipf), by its frequency, or by likeness to the targets."""
    neighbours: PositiveInt = 16
    """``divisor``: how many tokens of the most similar codes a target brings in."""
    share: Share = 0.5
    """``divisor``: the share of draws that goes to these; the rest is drawn by frequency."""

    def check_asked(self) -> None:
        """Raise ``ValueError`` for what would do nothing, of who asks for a new run."""
        if self.sampler == "divisor":
            return
        for name in ("neighbours", "share"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"train.sampled.{name} is of candidates by code: set train.sampled.sampler = "
                    "'divisor', too"
                )


class SimilarityConfig(Section):
    """The loss that pulls tokens of similar code together and fades (see ``docs/embeddings.md``)."""

    weight: NonNegative = 0.0
    """Its weight at the first step, beside the mean loss of a target; 0 turns it off."""
    until: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """The share of the steps over which the weight falls in a line to 0."""
    pairs: PositiveInt = 1024
    """Pairs of tokens drawn for each micro-batch."""
    neighbours: PositiveInt = 8
    """How many tokens of the most similar codes a token may be paired with."""
