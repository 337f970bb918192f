"""Texts that a model writes by itself, for logs and reports."""

from __future__ import annotations

from cllm.infer.generate import generate
from cllm.infer.sampling import Sampling
from cllm.model.transformer import Transformer
from cllm.text.tokenizer import Tokenizer


def sample_texts(model: Transformer, tokenizer: Tokenizer, *, count: int, tokens: int) -> list[str]:
    """``count`` texts of at most ``tokens`` tokens from the beginning of a document, seeds 0, 1, …"""
    texts = []
    for seed in range(count):
        sampling = Sampling(max_tokens=tokens, seed=seed)
        ids = generate(model, [tokenizer.end_id], sampling, end_id=tokenizer.end_id)
        texts.append(tokenizer.decode(ids))
    return texts
