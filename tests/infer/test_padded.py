"""Models whose table has more rows than the tokenizer has tokens: only tokens are ever written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cllm
from cllm.infer.batching import Request, serve
from cllm.infer.constrain import Format
from cllm.infer.direct import load_direct
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.generate import generate
from cllm.infer.jsonl import answer_file
from cllm.infer.sampling import Sampling
from cllm.store import checkpoint as checkpoints
from cllm.training.samples import sample_texts

GREEDY = Sampling(max_tokens=20, temperature=0.0)
DRAWN = Sampling(max_tokens=20, temperature=1.5, top_k=0, seed=2)


@pytest.fixture(scope="module")
def padded(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, fast: dict[str, Any]
) -> cllm.Run:
    """A run of 360 rows for 300 tokens, of which the unknown ones are by far the likeliest."""
    place = tmp_path_factory.mktemp("padded") / "run"
    shape = {"model.vocab_size": 360, "train.steps": 4}
    settings = {key.replace(".", "__"): value for key, value in (fast | shape).items()}
    run = cllm.train(data=corpus, out=place, quiet=True, **settings | {"model__context": 32})
    assert (run.tokenizer.vocab_size, run.config.model.vocab_size) == (300, 360)
    saved = checkpoints.load(place, "best")
    weights = {name: tensor.clone() for name, tensor in saved.weights.items()}
    table = weights["embedding.weight"]
    generator = torch.Generator().manual_seed(5)
    table.copy_(torch.randn(table.shape, generator=generator))
    table[300:] = 3 * table[:60]
    table[330:] = -3 * table[:30]
    checkpoints.save(
        place,
        saved.step + 1,
        weights=weights,
        optimizer={},
        state=saved.state,
        keep_last=1,
        best=True,
    )
    torch.set_num_threads(1)
    return cllm.load(place)


def test_the_unknown_rows_would_be_chosen(padded: cllm.Run) -> None:
    assert max(generate(padded.model, [1, 2], GREEDY)) >= 300
    assert max(generate(padded.model, [1, 2], DRAWN)) >= 300
    assert max(generate(padded.model, [1, 2], GREEDY, tokens=300)) < 300


def test_texts_are_written_in_tokens_whatever_is_asked(padded: cllm.Run, tmp_path: Path) -> None:
    for sampling in (GREEDY, DRAWN):
        assert "".join(padded.stream("The old", sampling))
    made = padded.complete(["The", ""] * 3, slots=3, max_tokens=40, repetition_penalty=1.2)
    assert len(made) == 6
    headed = padded.engine(index=True, slots=2)
    assert len(padded.complete(["The", "a"], engine=headed, max_tokens=20, top_k=5)) == 2
    (tmp_path / "p.jsonl").write_text('{"prompt": "The"}')
    out = tmp_path / "o.jsonl"
    answer_file(padded.engine(), padded.tokenizer, tmp_path / "p.jsonl", out, Sampling(logprobs=3))
    assert json.loads(out.read_text())["logprobs"]


def test_the_texts_of_a_report_are_of_tokens(
    padded: cllm.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[int]] = []

    def spied(*args: Any, **options: Any) -> list[int]:
        made.append(generate(*args, **options))
        return made[-1]

    monkeypatch.setattr("cllm.training.samples.generate", spied)
    sample_texts(padded.model, padded.tokenizer, count=2, tokens=9)
    assert made
    assert max((token for ids in made for token in ids), default=0) < 300


def test_forms_hold_whatever_the_engine_knows_of_tokens(padded: cllm.Run) -> None:
    pytest.importorskip("llguidance")
    form = Format("regex", "[ab]{3}")
    unaware = Engine(padded.model)
    for engine in (padded.engine(), unaware):
        text = "".join(padded.stream("The", DRAWN, form=form, engine=engine))
        assert len(text) == 3
        assert set(text) <= {"a", "b"}


def test_log_probabilities_are_of_all_rows(padded: cllm.Run) -> None:
    sampling = Sampling(max_tokens=1, temperature=0, logprobs=2)
    step = next(serve(padded.engine(), [Request([1, 2], sampling)]))
    with torch.no_grad():
        wanted = padded.model(torch.tensor([[1, 2]]))[0, -1].double().log_softmax(-1)
    known = wanted[:300].topk(2)
    assert [token for token, _ in step.top] == known.indices.tolist()
    assert step.logprob == pytest.approx(float(known.values[0]), abs=1e-4)
    assert float(wanted[:300].exp().sum()) < 0.9, "the unknown rows have a share to lose"
    ids = [padded.tokenizer.end_id, *map(int, padded.tokenizer.encode("The old"))]
    with torch.no_grad():
        rows = padded.model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    total = float(rows.gather(1, torch.tensor(ids[1:])[:, None]).sum())
    assert padded.score("The old").logprob == pytest.approx(total, rel=1e-4)


def test_the_compiled_loop_writes_tokens_alone(padded: cllm.Run, library: Path) -> None:
    run = cllm.load(padded.path)
    torch.set_num_threads(1)
    engine, direct = run.engine(), load_direct(run.path)
    assert engine.native is not None
    assert direct is not None
    eager = run.engine(compiled=False)
    for sampling in (GREEDY, DRAWN):
        wanted = "".join(run.stream("The old", sampling, engine=eager))
        engine.use_compiled(True)
        assert "".join(run.stream("The old", sampling, engine=engine)) == wanted
        assert "".join(direct.write("The old", sampling)) == wanted
    engine.use_compiled(True)
    steps = list(serve(engine, [Request([1], Sampling(max_tokens=3, temperature=0, logprobs=1))]))
    plain = list(serve(Engine(run.model, EngineOptions(tokens=300)), [Request([1], GREEDY)]))
    assert [s.token for s in steps[:3]] == [s.token for s in plain[:3]]
