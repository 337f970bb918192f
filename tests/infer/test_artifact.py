"""A compiled step computes what the eager one does, and is used only where it was made for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cllm.core.errors import UserError
from cllm.core.machine import cannot_compile
from cllm.infer.artifact import artifact_path, compile_decode, load_decode
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.generate import generate
from cllm.infer.sampling import Sampling
from cllm.model.transformer import Transformer

Make = Callable[..., Transformer]


@pytest.mark.slow
def test_a_compiled_step_writes_the_same_and_is_used_where_it_was_made_for(
    isolated: Path, model_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cannot_compile():
        pytest.skip(str(cannot_compile()))
    model = model_of(n_layers=1).float().eval()
    engine, place = Engine(model, EngineOptions(slots=2)), isolated / "compiled"
    assert load_decode(engine, place) == (None, "")
    path = compile_decode(engine, place)
    step, line = load_decode(engine, place)
    assert step is not None
    assert line == f"compiled step {path.name}"
    assert [file.name for file in place.iterdir()] == [path.name], "nothing else is left behind"
    engine.compiled = step
    sampling = Sampling(max_tokens=30, temperature=0.0)  # beyond the context of 12
    made = []
    for wanted in (False, True):
        engine.use_compiled(wanted)
        logits = [engine.start(slot, [slot + 1, 5]).logits for slot in range(2)]
        logits.append(engine.step({0: 7, 1: 3}).logits)
        made.append((torch.cat(logits), generate(engine, [4], sampling)))
    assert torch.allclose(made[0][0], made[1][0], atol=1e-4)
    assert made[0][1] == made[1][1]

    def unused(other: Engine) -> str:
        step, line = load_decode(other, place)
        assert step is None
        return line

    for options in (EngineOptions(slots=3), EngineOptions(slots=2, weights="bf16")):
        assert "not used" in unused(Engine(model, options))
    changed = model_of(n_layers=1).float().eval()
    changed.norm.weight.data[0] += 1e-3
    assert "not used" in unused(Engine(changed, EngineOptions(slots=2)))
    with monkeypatch.context() as patch:
        patch.setattr("cllm.core.measurements.torch_version", lambda: "2.99")
        assert "not used" in unused(engine)
    with monkeypatch.context() as patch:  # another user's, or another machine's
        patch.setenv("CLLM_CACHE", str(isolated / "other"))
        assert "was not compiled by you on this machine" in unused(engine)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    assert "is damaged" in unused(engine)


def test_what_cannot_be_compiled_says_why(
    isolated: Path, model_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, place = model_of().float().eval(), isolated / "compiled"
    with pytest.raises(UserError, match="packed weights are no tensors"):
        compile_decode(Engine(model, EngineOptions(weights="int8-dynamic")), place)
    monkeypatch.setattr("cllm.infer.artifact.cannot_compile", lambda: "no C++ compiler")
    with pytest.raises(UserError, match="cannot be compiled: no C"):
        compile_decode(Engine(model), place)
    assert not place.exists()
    assert artifact_path(Engine(model), place) == artifact_path(Engine(model), place)
