"""The adapter answers what the lm-eval harness asks: shapes as in ``lm_eval.api.model.LM``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import cllm
from cllm.core.errors import UserError


class StubLM:
    """The part of ``lm_eval.api.model.LM`` that an adapter inherits from."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in the place of lm-eval, which is too large to be installed for a test."""
    module = ModuleType("lm_eval.api.model")
    module.LM = StubLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.api", ModuleType("lm_eval.api"))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)


def asked(*args: Any) -> SimpleNamespace:
    """A request."""
    return SimpleNamespace(args=args)


def test_the_harness_is_answered(stub: None, trained: Path) -> None:
    run = cllm.load(trained)
    model = run.harness_model()
    torch.set_num_threads(1)
    assert isinstance(model, StubLM)
    assert model.world_size == 1
    pairs = [("The old", " dog"), ("", "The quiet child")]
    found = model.loglikelihood([asked(*pair) for pair in pairs])
    assert found[0] == (run.score(" dog", "The old").logprob, run.score(" dog", "The old").greedy)
    assert found[1][0] == run.score("The quiet child").logprob
    (rolling,) = model.loglikelihood_rolling([asked("The old dog. " * 60)])
    assert rolling == run.score("The old dog. " * 60).logprob
    whole = run.generate("The old", max_tokens=20, temperature=0)
    settings = {"until": [whole[9:11]], "max_gen_toks": 20, "do_sample": False}
    made = model.generate_until([asked("The old", settings), asked("The old", {"until": "@@"})])
    assert made[0] == whole[: whole.index(whole[9:11])]
    assert made[1].startswith(whole)


def test_the_extra_is_named_where_it_is_missing(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'cllm\[lm-eval\]'"):
        cllm.load(trained).harness_model()


@pytest.mark.slow  # its import alone takes many seconds
def test_a_task_of_lm_eval_itself_runs(
    trained: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(isolated / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    rows = [
        {"text": "The old", "choices": [" dog sees", " qzx qzx"], "label": 0},
        {"text": "The quiet", "choices": [" zzkw zzkw", " child"], "label": 1},
        {"text": "The green", "choices": [" stone", " wvvq wvvq"], "label": 1},
    ]
    common = {
        "dataset_path": "none",
        "custom_dataset": lambda **facts: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    choice = common | {
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    written = common | {
        "task": "written",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    run = cllm.load(trained)
    model = run.harness_model()
    torch.set_num_threads(1)
    found = lm_eval.simple_evaluate(model=model, tasks=[choice, written], bootstrap_iters=0)
    ours = 0
    for row in rows:
        scores = [run.score(text, row["text"]).logprob for text in row["choices"]]
        ours += scores.index(max(scores)) == row["label"]
    assert found["results"]["choice"]["acc,none"] == pytest.approx(ours / 3)
    samples = found["samples"]["written"]
    texts = {s["doc"]["text"]: s["resps"][0][0] for s in samples}
    for text, made in texts.items():
        whole = run.generate(text, max_tokens=8, temperature=0, stop=(".",))
        assert made == whole
