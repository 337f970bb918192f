"""Closest tokens of a run, and the index as an output head."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cllm.core.errors import UsageError, UserError
from cllm.infer.generate import NonFiniteLogitsError, generate
from cllm.infer.lookup import TokenIndex
from cllm.infer.lookup.head import IndexHead, index_head
from cllm.infer.lookup.tokens import token_neighbours, token_of
from cllm.infer.sampling import Sampling
from cllm.model.transformer import Transformer
from cllm.text.tokenizer import Tokenizer

Make = Callable[..., Transformer]


@pytest.fixture
def model(model_of: Make) -> Transformer:
    """A model with a vocabulary that makes cells, its weights as float32 has them."""
    made = model_of(vocab_size=900)
    for parameter in made.parameters():
        parameter.data = parameter.data.float().double()
    return made


@pytest.mark.parametrize("plain", [True, False])
def test_greedy_text_is_the_whole_heads(model: Transformer, plain: bool) -> None:
    sampling = Sampling(max_tokens=30, temperature=0.0)
    index = TokenIndex.build(model.output.table(), plain=plain, cell_size=16)
    assert plain or index.cells > 20
    whole = generate(model, [1, 2], sampling)
    assert generate(model, [1, 2], sampling, head=IndexHead(index, exact=True)) == whole
    assert len(set(whole)) > 3


def test_an_approximate_head_may_miss_and_draws_from_the_k_likeliest(model: Transformer) -> None:
    index = TokenIndex.build(model.output.table(), plain=False, cell_size=16)
    hidden = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    likeliest = (model.output.logits(hidden[None])[0]).topk(5).indices.tolist()
    generator = torch.Generator().manual_seed(0)
    head = IndexHead(index, exact=True)
    sampling = Sampling(temperature=5.0, top_k=5)
    drawn = {head.choose(hidden, sampling, generator) for _ in range(200)}
    assert drawn == set(likeliest)
    assert head.choose(hidden, Sampling(temperature=0.0), generator) == likeliest[0]


def test_a_head_that_cannot_answer_says_so(model: Transformer, model_of: Make) -> None:
    head = IndexHead(TokenIndex.build(model.output.table()))
    with pytest.raises(UsageError, match="needs top_k"):
        generate(model, [1], Sampling(top_k=0), head=head)
    with pytest.raises(UsageError, match="knows no log-probabilities"):
        generate(model, [1], Sampling(logprobs=1), head=head)
    other = IndexHead(TokenIndex.build(torch.ones(5, 3)))
    with pytest.raises(UserError, match=r"\(1, 16\) do not fit a table of shape \(5, 3\)"):
        generate(model, [1], Sampling(), head=other)
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteLogitsError, match="its weights are damaged"):
        generate(model, [1], Sampling(temperature=0.0), head=head)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small one with whole words."""
    return Tokenizer.train(["the old river and the green stone\n"] * 30, 300)


def test_a_word_is_a_token_with_or_without_its_space(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([token_of(tokenizer, "the")]) == "the"
    assert tokenizer.decode([token_of(tokenizer, "river")]) == " river"
    with pytest.raises(UsageError, match=r"'zebra' is no single token \('z'"):
        token_of(tokenizer, "zebra")
    with pytest.raises(UsageError, match="empty"):
        token_of(tokenizer, "")
    assert token_of(tokenizer, "#42") == 42
    assert token_of(tokenizer, "<|endoftext|>") == tokenizer.end_id
    with pytest.raises(UsageError, match=f"no token #{tokenizer.vocab_size}: ids are 0 to"):
        token_of(tokenizer, f"#{tokenizer.vocab_size}")
    with pytest.raises(UsageError, match="no single token"):
        token_of(tokenizer, "#" + "9" * 5000)


def test_neighbours_leave_the_token_out_and_a_vector_finds_its_token(tokenizer: Tokenizer) -> None:
    table = np.random.default_rng(0).standard_normal((tokenizer.vocab_size, 8)).astype(np.float32)
    table[7] = table[9]  # copies are neighbours at distance 0
    near = token_neighbours(table, tokenizer, 9, 4, "l2")
    assert [near[0].id, near[0].score] == [7, 0.0]
    assert 9 not in [token.id for token in near]
    assert len(near) == 4
    by_vector = token_neighbours(table, tokenizer, table[20], 3, "cosine")
    assert by_vector[0].id == 20
    assert by_vector[0].score == pytest.approx(1)
    end = token_neighbours(table, tokenizer, table[tokenizer.end_id], 1, "l2")
    assert end[0].text == "<|endoftext|>"
    with pytest.raises(ValueError, match="does not fit a table"):
        token_neighbours(table, tokenizer, np.ones(9), 3, "ip")
    with pytest.raises(ValueError, match="the other tokens"):
        token_neighbours(table, tokenizer, 3, len(table), "ip")


def test_the_command_on_a_run(
    cllm: Callable[..., Any], options: Callable[..., list[str]], corpus: Path, tmp_path: Path
) -> None:
    made = cllm("train", "--data", corpus, "--out", "run", "--quiet", *options())
    assert made.code == 0, made.err
    shown = cllm("tokens", "nearest", "run", "e", "-k", "3")
    assert shown.code == 0, shown.err
    assert len(shown.out.splitlines()) == 3
    assert re.fullmatch(r"closest to 'e' \(#\d+\):\n", shown.err)
    tokenizer_file = cllm("tokens", "nearest", "run/tokenizer.json", "e")
    assert (tokenizer_file.code, "name a run" in tokenizer_file.err) == (1, True)
    found = json.loads(cllm("tokens", "nearest", "run", "e", "-k", "3", "--json").out)
    lines = shown.out.splitlines()
    assert all(str(token["id"]) in line for token, line in zip(found, lines, strict=True))
    assert found[0]["score"] >= found[1]["score"] >= found[2]["score"]
    from cllm.api import load
    from cllm.bench.lookup_tables import table_and_hidden_vectors

    table, hidden = table_and_hidden_vectors(Path("run"), 10)
    logits = load("run").model.output.logits(torch.from_numpy(hidden))
    np.testing.assert_allclose(hidden @ table.T, logits.detach().numpy(), rtol=1e-4, atol=1e-5)
    vectors = load("run").model.output.table().detach().numpy()
    np.save(tmp_path / "vector.npy", vectors[42])
    by_vector = cllm(
        "tokens", "nearest", "run", "vector.npy", "--metric", "l2", "--table", "output", "--json"
    )
    first = json.loads(by_vector.out)[0]
    assert (first["id"], first["score"]) == (42, 0.0)
    np.save(tmp_path / "wrong.npy", vectors[42][:5])
    np.save(tmp_path / "nan.npy", vectors[42] * np.nan)
    mistakes = {
        ("wrong.npy",): (1, "does not fit a table"),
        ("nowhere.npy",): (1, "no such file"),
        ("e", "--metric", "cos"): (2, "none of ip, l2, cosine"),
        ("e", "--table", "both"): (2, "neither input nor output"),
        ("e", "-k", "0"): (2, "at least 1"),
        ("e", "-k", "100000"): (2, "is more than the"),
        ("nan.npy",): (1, "nan.npy holds NaN or infinity"),
        ("zebra zebra",): (2, "no single token"),
    }
    for arguments, (code, message) in mistakes.items():
        result = cllm("tokens", "nearest", "run", *arguments)
        assert (result.code, message in result.err) == (code, True), result.err
        assert len(result.err.splitlines()) == 1


def test_rows_that_are_no_tokens_are_nobodys_neighbours(
    cllm: Callable[..., Any], options: Callable[..., list[str]], corpus: Path
) -> None:
    size = {"tokenizer__vocab_size": 280, "model__vocab_size": 400}
    # Rows that nothing was ever read from begin alike by the crystal, and all have a token's neighbours.
    start = {"model__embedding__init": "crystal", "train__steps": 2}
    made = cllm("train", "--data", corpus, "--out", "run", "--quiet", *options(**size, **start))
    assert made.code == 0, made.err
    for metric in ("cosine", "l2", "ip"):
        found = cllm("tokens", "nearest", "run", "e", "-k", 279, "--metric", metric, "--json")
        assert found.code == 0, found.err
        assert max(token["id"] for token in json.loads(found.out)) == 279
    similar = json.loads(cllm("tokens", "similar", "run", "e", "-k", 30, "--json").out)
    assert len(similar["by_embedding"]) == 30


def test_an_index_of_a_damaged_table_is_refused(model: Transformer) -> None:
    with torch.no_grad():
        model.output.weight[7, 1] = torch.nan
    with pytest.raises(UserError, match=r"no index of the output table: row 7"):
        index_head(model)


def test_generate_takes_the_index_and_says_where_it_is_a_scan(
    trained: Path, cllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["generate", trained, "--prompt", "The old", "--max-tokens", 30, "--temperature", 0]
    whole = cllm(*asked)
    scanned = cllm(*asked, "--index")
    assert scanned.out == whole.out
    assert "output head: a plain scan of 300 tokens; cells from 16,384 on" in scanned.err
    with monkeypatch.context() as patch:
        patch.setattr("cllm.infer.lookup.index.PLAIN_BELOW", 100)
        indexed = cllm(*asked, "--index")
    assert indexed.out == whole.out
    assert "an exact index of 300 tokens in " in indexed.err
    refused = cllm("generate", trained, "--index", "--top-k", 0)
    assert refused.code == 2
    assert "needs top_k of at least 1" in refused.err
    assert cllm("generate", trained, "--index", "--regex", "a").code == 2
