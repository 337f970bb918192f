"""``cllm.train`` and ``cllm.load`` from Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import cllm
from cllm.core.config import Config
from cllm.core.model_config import ModelConfig
from cllm.core.settings import build
from cllm.infer.sampling import Sampling


@pytest.fixture
def settings(fast: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a very short run."""
    return {key.replace(".", "__"): value for key, value in (fast | {"train.steps": 4}).items()}


def test_train_returns_a_run_to_look_at(
    isolated: Path, corpus: Path, settings: dict[str, Any]
) -> None:
    run = cllm.train(data=corpus, out="run", quiet=True, **settings)
    assert run.path == Path("run")
    assert isinstance(run.config, Config)
    assert run.config.data.paths == (str(corpus),)
    assert run.metrics()["step"] == [1, 2, 3, 4]
    assert run.metrics("validation")["step"] == [4]
    assert math.isfinite(run.metrics("test")["bpb"][0])
    assert run.report.is_file()
    assert run.tokenizer.vocab_size == 300
    assert not run.model.training


def test_data_may_be_a_path_a_text_or_several(
    isolated: Path, corpus: Path, settings: dict[str, Any], text_of: Callable[..., str]
) -> None:
    (isolated / "more.txt").write_text(text_of(50, seed=8))
    for number, data in enumerate([str(corpus), [corpus, "more.txt"]]):
        run = cllm.train(data, out=f"run{number}", quiet=True, **settings)
        assert len(run.config.data.paths) == number + 1


def test_a_configuration_may_be_an_object_or_a_file(
    isolated: Path, corpus: Path, fast: dict[str, Any]
) -> None:
    config = build(fast | {"train.steps": 2, "data.paths": (str(corpus),)})
    one = cllm.train(config=config, out="one", quiet=True)
    (isolated / "c.toml").write_text(one.directory.config.read_text(encoding="utf-8"))
    two = cllm.train(config="c.toml", out="two", quiet=True)
    assert one.config == two.config
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name])


def test_resume_goes_on(isolated: Path, corpus: Path, settings: dict[str, Any]) -> None:
    run = cllm.train(data=corpus, out="run", quiet=True, **settings)
    longer = cllm.train(resume=run.path, quiet=True, train__steps=6, train__betas=(0.8, 0.9))
    assert longer.metrics()["step"][-1] == 6
    assert longer.config.train.betas == (0.8, 0.9)


@pytest.mark.parametrize("name", ["data", "config", "from_run", "out", "time"])
def test_resume_takes_nothing_that_it_would_ignore(name: str, isolated: Path) -> None:
    with pytest.raises(cllm.UserError, match=f"leave out {name}"):
        cllm.train(resume="run", **{name: "1"})


def test_an_unknown_setting_is_refused_with_the_nearest(isolated: Path) -> None:
    with pytest.raises(cllm.UserError, match=r"did you mean 'train.lr'"):
        cllm.train(train__lrr=1)


def test_load_takes_a_run_or_one_of_its_checkpoints(trained: Path) -> None:
    run, last = cllm.load(trained), cllm.load(trained / "checkpoints" / "last")
    assert last.config == run.config
    steps = run.directory.steps()
    first = cllm.load(trained / "checkpoints" / f"step-{steps[0]:08d}")
    newest = cllm.load(trained / "checkpoints" / f"step-{steps[-1]:08d}")
    names = first.model.state_dict()
    assert any(not torch.equal(t, newest.model.state_dict()[n]) for n, t in names.items())
    for name, tensor in newest.model.state_dict().items():
        assert torch.equal(tensor, last.model.state_dict()[name])
    with pytest.raises(cllm.UserError, match="does not exist"):
        cllm.load(trained / "nothing")


def test_generate_and_stream_write_the_same(trained: Path) -> None:
    run = cllm.load(trained)
    text = run.generate("The old", max_tokens=25, seed=3)
    assert text == "".join(run.stream("The old", Sampling(max_tokens=25, seed=3)))
    assert run.generate(max_tokens=5, seed=1) == run.generate("", max_tokens=5, seed=1)


def test_streams_that_are_read_in_turns_do_not_disturb_each_other(trained: Path) -> None:
    run = cllm.load(trained)
    alone = {p: run.generate(p, max_tokens=30, temperature=0) for p in ("The old", "A", "x 7")}
    sampling = Sampling(max_tokens=30, temperature=0)
    streams = {prompt: run.stream(prompt, sampling) for prompt in alone}
    found = dict.fromkeys(alone, "")
    for _ in range(40):
        for prompt, stream in streams.items():
            found[prompt] += next(stream, "")
    assert found == alone
    within = ""
    for number, piece in enumerate(run.stream("The old", sampling)):
        within += piece
        if number == 2:
            assert run.generate("A", max_tokens=30, temperature=0) == alone["A"]
            many = run.complete(["A", "x 7"], slots=2, max_tokens=30, temperature=0)
            assert [made.text for made in many] == [alone["A"], alone["x 7"]]
    assert within == alone["The old"]


def test_threads_write_at_once(trained: Path) -> None:
    run = cllm.load(trained)
    prompts = ["The old", "A", "x 7", "The quiet child"]
    alone = [run.generate(prompt, max_tokens=30, temperature=0) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(lambda p: run.generate(p, max_tokens=30, temperature=0), prompts * 3)
        assert list(made) == alone * 3


def test_an_engine_of_ones_own_writes_one_text_at_a_time(trained: Path) -> None:
    run = cllm.load(trained)
    engine, sampling = run.engine(), Sampling(max_tokens=9, temperature=0)
    stream = run.stream("The old", sampling, engine=engine)
    text = next(stream)
    with pytest.raises(cllm.UserError, match="this engine is writing another text"):
        next(run.stream("A", sampling, engine=engine))
    assert run.generate("A", max_tokens=9, temperature=0), "the run makes another"
    text += "".join(stream)
    assert text == "".join(run.stream("The old", sampling, engine=engine))
    abandoned = run.stream("A", sampling, engine=engine)
    next(abandoned)
    del abandoned
    assert "".join(run.stream("The old", sampling, engine=engine)) == text
    eager = run.engine(compiled=False)
    assert eager is not engine
    assert run.engine() is engine


def test_evaluate_scores_splits_and_texts(trained: Path, corpus: Path) -> None:
    run = cllm.load(trained)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    split, text = run.evaluate(split="train"), run.evaluate(corpus)
    assert text.bytes == corpus.stat().st_size
    assert text.bpb == pytest.approx(split.bpb, rel=0.05)
    assert run.evaluate([corpus]).bpb == text.bpb
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(cllm.UserError, match="none of train, validation, test"):
        run.evaluate(split="all")


def test_a_run_without_a_split_says_so(
    isolated: Path, corpus: Path, settings: dict[str, Any]
) -> None:
    run = cllm.train(corpus, out="run", quiet=True, **settings, data__test=0.0)
    with pytest.raises(cllm.UserError, match="has no test split"):
        run.evaluate(split="test")


def test_evaluating_in_bf16_leaves_rotary_tables_exact(
    isolated: Path, corpus: Path, settings: dict[str, Any]
) -> None:
    run = cllm.train(corpus, out="run", quiet=True, **settings | {"train__dtype": "bf16"})
    fresh = type(run.model)(ModelConfig(**run.config.model.model_dump()))
    run.evaluate()
    assert torch.equal(run.model.cos, fresh.cos)
    assert run.model.cos.dtype == torch.float32
