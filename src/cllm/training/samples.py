"""Texts that a model writes by itself, for logs and reports."""

from __future__ import annotations

from cllm.infer.generate import NonFiniteLogitsError, generate
from cllm.infer.sampling import Sampling
from cllm.model.transformer import Transformer
from cllm.text.tokenizer import Tokenizer

DRAWS = 4
"""Seeds tried for each text: a young model often ends a text before it has begun."""


def sample_texts(model: Transformer, tokenizer: Tokenizer, *, count: int, tokens: int) -> list[str]:
    """Up to ``count`` texts of at most ``tokens`` tokens each, as a document may begin.

    Seeds 0, 1, … are drawn; empty texts are passed over. A model whose training diverges writes none.
    """
    texts: list[str] = []
    for seed in range(count * DRAWS):
        sampling = Sampling(max_tokens=tokens, seed=seed)
        try:
            ids = generate(
                model,
                [tokenizer.end_id],
                sampling,
                end_id=tokenizer.end_id,
                tokens=tokenizer.vocab_size,
            )
        except NonFiniteLogitsError:
            break
        text = tokenizer.decode(ids)
        if text.strip():
            texts.append(text)
        if len(texts) == count:
            break
    return texts
