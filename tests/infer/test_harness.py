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
