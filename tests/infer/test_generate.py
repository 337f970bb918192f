"""Generation with the cache against generation that computes everything anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cllm.core.errors import UserError
from cllm.infer.generate import NonFiniteLogitsError, generate, stream
from cllm.infer.sampling import Sampling, choose_token
from cllm.infer.streaming import TextStream
from cllm.model.transformer import Transformer
from cllm.text.tokenizer import Tokenizer

Make = Callable[..., Transformer]


def recomputed(model: Transformer, ids: list[int], sampling: Sampling) -> list[int]:
    """What ``generate`` promises, without a cache: full forward passes over the window in view.

    The window grows to the context; then its second half is read anew.
    """
    context = model.config.context
    generator = torch.Generator().manual_seed(sampling.seed)
    seen = list(ids)
    begin = max(len(seen) - context, 0)
    made: list[int] = []
    for _ in range(sampling.max_tokens):
        if len(seen) - begin > context:
            begin = len(seen) - max(context // 2, 1)
        with torch.no_grad():
            logits = model(torch.tensor([seen[begin:]]))[0, -1]
        made.append(choose_token(logits, sampling, generator))
        seen.append(made[-1])
    return made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", [1, 5, 12, 40])
@pytest.mark.parametrize("attention", ["matmul", "sdpa"])
@pytest.mark.parametrize(
    "fields", [{}, {"n_kv_heads": 1}, {"positions": "learned"}, {"norm": "batchnorm"}]
)
def test_the_cache_gives_what_recomputing_gives_also_past_the_context(
    fields: dict, attention: str, prompt: int, temperature: float, model_of: Make
) -> None:
    model = model_of(attention, **fields).eval()
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(0, 31, (prompt,), generator=generator).tolist()
    sampling = Sampling(max_tokens=40, temperature=temperature, top_k=0, seed=prompt)
    made = generate(model, ids, sampling)
    assert made == recomputed(model, ids, sampling)
    assert len(made) == 40
    assert len(set(made)) > 1


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_smallest_contexts_work(context: int, model_of: Make) -> None:
    model = model_of(context=context).eval()
    sampling = Sampling(max_tokens=9, seed=2)
    assert generate(model, [3, 4, 5], sampling) == recomputed(model, [3, 4, 5], sampling)


def test_generation_stops_before_the_end_token(model_of: Make) -> None:
    model = model_of()
    sampling = Sampling(max_tokens=50, seed=1, top_k=0)
    whole = generate(model, [1], sampling)
    end = whole[7]
    assert generate(model, [1], sampling, end_id=end) == whole[: whole.index(end)]


def test_the_same_seed_draws_the_same_tokens_whatever_else_is_drawn(model_of: Make) -> None:
    model = model_of(residual_dropout=0.5).train()
    first = generate(model, [1, 2], Sampling(seed=5))
    torch.randn(10)
    assert generate(model, [1, 2], Sampling(seed=5)) == first
    assert generate(model, [1, 2], Sampling(seed=6)) != first
    assert model.training, "the mode is as it was"


def test_the_stream_is_what_generate_gives_token_by_token(model_of: Make) -> None:
    model = model_of()
    tokens = stream(model, [1], Sampling(max_tokens=5))
    assert [next(tokens) for _ in range(5)] == generate(model, [1], Sampling(max_tokens=5))
    assert next(tokens, None) is None


def test_an_empty_prompt_and_damaged_weights_are_refused(model_of: Make) -> None:
    model = model_of()
    with pytest.raises(UserError, match="the prompt has no tokens"):
        generate(model, [], Sampling())
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteLogitsError, match="its weights are damaged"):
        generate(model, [1], Sampling(temperature=0.0))


def test_a_stream_of_text_shows_whole_characters_only() -> None:
    tokenizer = Tokenizer.train(["plain words of some text\n"] * 20, 270)
    text = "naïve 日本語 🦊 words"
    shown = TextStream(tokenizer)
    pieces = [shown.feed(int(token)) for token in tokenizer.encode(text)]
    assert "".join(pieces) + shown.end() == text
    assert "" in pieces, "some token held a part of a character"
    assert not any("\ufffd" in piece for piece in pieces)
    ids = torch.randint(0, 270, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    wild, parts = TextStream(tokenizer), []
    for token in ids:  # halves of characters that nothing completes, too
        parts.append(wild.feed(token))
    whole = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", errors="replace")
    assert "".join(parts) + wild.end() == whole
    cut = TextStream(tokenizer)
    fox = [int(token) for token in tokenizer.encode("🦊")]
    assert "".join(map(cut.feed, fox[:-1])) == ""
    assert cut.end() == "\ufffd"
