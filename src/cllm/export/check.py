"""Whether an exported file gives the answers of the model it was made from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cllm.core.errors import UserError
from cllm.export.runtime import Runtime
from cllm.export.source import Source
from cllm.model.transformer import Transformer

TOLERANCE = 1e-4
"""Largest difference of a logit where the runtime computes in float32."""
DIVERGENCE = 0.01
"""Largest mean Kullback-Leibler divergence in nats a token where it rounds activations too."""
TEXTS = 200
"""Texts whose tokens are compared."""


class CheckFailedError(UserError):
    """An exported file does not give the model's answers."""


@dataclass(frozen=True)
class Checked:
    """What a check found."""

    runtime: str
    positions: int
    difference: float
    """Largest absolute difference of a logit."""
    divergence: float
    """Mean Kullback-Leibler divergence from the model to the file, nats a token."""
    texts: int
    """Texts whose tokens were the same; 0 where the file holds no tokenizer."""

    def line(self) -> str:
        """What a person wants to know."""
        texts = f"; the tokens of {self.texts} texts are the same" if self.texts else ""
        return (
            f"checked in {self.runtime}: logits at {self.positions:,} positions differ by at most "
            f"{self.difference:.1e} (divergence {self.divergence:.1e} nats a token){texts}"
        )


def check(runtime: Runtime, reference: Transformer, source: Source, *, shapes: int = 8) -> Checked:
    """Compare logits over held-out and random ids of ``shapes`` shapes, and tokens of random texts.

    ``reference`` has the weights as the file stores them. Raises ``CheckFailedError``.
    """
    worst, divergence, positions = 0.0, 0.0, 0
    for ids in batches(source, shapes):
        with torch.no_grad():
            ours = reference(torch.from_numpy(ids)).double()
        for theirs in _answers(runtime, ids):
            gap, apart = _compare(runtime.name, ours, torch.from_numpy(theirs).double())
            worst = max(worst, gap) if gap == gap else gap
            divergence += apart
            positions += ids.size
    divergence /= positions
    fits = worst <= TOLERANCE if runtime.exact else divergence <= DIVERGENCE
    if not fits:
        allowed = (
            f"{TOLERANCE:g} at most is allowed"
            if runtime.exact
            else f"a divergence of {DIVERGENCE:g} nats a token is allowed, not {divergence:.3g}"
        )
        raise CheckFailedError(
            f"in {runtime.name} the logits differ from the model's by up to {worst:.3g}, and "
            f"{allowed}"
        )
    texts = same_tokens(runtime, source)
    return Checked(runtime.name, positions, worst, divergence, texts)


def _answers(runtime: Runtime, ids_bt: np.ndarray) -> Iterator[np.ndarray]:
    """Logits of the whole ids, and by the cache where there is one: in two pieces and a last token."""
    yield np.asarray(runtime.logits(ids_bt))
    if runtime.stepwise is not None:
        length = ids_bt.shape[1]
        edges = sorted({length // 2, length - 1} - {0})
        yield np.concatenate(runtime.stepwise(np.split(ids_bt, edges, axis=1)), axis=1)


def _compare(name: str, ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """(largest difference of a logit, summed Kullback-Leibler divergence in nats)."""
    if theirs.shape != ours.shape:
        raise CheckFailedError(
            f"{name} gives logits of shape {tuple(theirs.shape)} where the model gives "
            f"{tuple(ours.shape)}"
        )
    log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return (theirs - ours).abs().max().item(), float((log_p.exp() * (log_p - log_q)).sum())


def batches(source: Source, shapes: int) -> Iterator[np.ndarray]:
    """Ids (B, T) of ``shapes`` shapes: one token, a whole context, and random ones between."""
    context, rng = source.config.context, np.random.default_rng(0)
    assert source.config.vocab_size is not None
    for number in range(shapes):
        batch, length = {0: (1, 1), 1: (2, context), 2: (3, 1)}.get(
            number, (int(rng.integers(1, 4)), int(rng.integers(1, context + 1)))
        )
        if number % 2 and len(source.sample) > length:
            starts = rng.integers(0, len(source.sample) - length, batch)
            yield np.stack([source.sample[start : start + length] for start in starts])
        else:
            yield rng.integers(0, source.config.vocab_size, (batch, length))


def same_tokens(runtime: Runtime, source: Source, texts: int = TEXTS) -> int:
    """How many texts were compared, or 0 where the file has no tokenizer; ``CheckFailedError``."""
    if runtime.encode is None:
        return 0
    for text in random_texts(source, texts):
        ours = [source.tokenizer.end_id, *map(int, source.tokenizer.encode(text))]
        theirs = list(runtime.encode(text))
        if ours != theirs:
            raise CheckFailedError(
                f"in {runtime.name} the tokens of {text[:60]!r} are {theirs[:12]}, and the run's are "
                f"{ours[:12]}"
            )
    return texts


def random_texts(source: Source, count: int, seed: int = 0) -> Iterator[str]:
    """Texts of all kinds: held-out ones, letters of many scripts, spaces, digits, what looks special."""
    rng = random.Random(seed)
    held_out = source.tokenizer.decode(source.sample)
    specials = list(source.tokenizer.special_tokens())
    for number in range(count):
        if number % 4 == 0 and len(held_out) > 100:
            start = rng.randrange(len(held_out) - 100)
            yield held_out[start : start + rng.randrange(1, 100)]
        else:
            parts = (_part(rng, specials) for _ in range(rng.randrange(0, 16)))
            yield "".join(parts)


def _part(rng: random.Random, specials: list[str]) -> str:
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(
            [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "   \n ", "\u3000", "\v"]
        )
    if kind == 1:
        return rng.choice(
            ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "\u2019s", "'"]
        )
    if kind == 2:
        return str(rng.randrange(10 ** rng.randrange(1, 9)))
    if kind == 3:
        return rng.choice(specials)
    if kind == 4:
        first, last = rng.choice(SCRIPTS)
        return "".join(chr(rng.randrange(first, last)) for _ in range(rng.randrange(1, 6)))
    if kind == 5:
        return rng.choice(
            ["!", "?!", "...", "--", "(", '"', "_", "#$%", "\u2026", "<|", "|>", "</s>"]
        )
    word = "".join(rng.choice("etaoinshrdlucmfw") for _ in range(rng.randrange(1, 9)))
    return rng.choice(["", " "]) + rng.choice([word, word.title(), word.upper()])


SCRIPTS = [
    (0x20, 0x7F),
    (0xA0, 0x250),
    (0x370, 0x400),
    (0x400, 0x530),
    (0x5D0, 0x5EB),
    (0x620, 0x670),
    (0x900, 0x980),
    (0xE00, 0xE5C),
    (0x1100, 0x1200),
    (0x2000, 0x2070),
    (0x2190, 0x2300),
    (0x3040, 0x3100),
    (0x4E00, 0x9FA6),
    (0xAC00, 0xD7A4),
    (0x1F300, 0x1F650),
    (0x0, 0x20),
]
"""Ranges of Unicode that random texts are drawn from."""
