"""One text by the compiled loop alone is what the engine writes, and torch is not imported for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cllm
from cllm.core.model_config import EmbeddingConfig, ModelConfig
from cllm.infer.direct import Direct, load_direct, rotary_arrays, uniforms
from cllm.infer.engine import Engine
from cllm.infer.loop import compile_library
from cllm.infer.request import NonFiniteLogitsError, Sampling
from cllm.infer.sampling import uniform
from cllm.model.attention import rotary_tables
from cllm.model.transformer import Transformer
from cllm.store import checkpoint as checkpoints

Train = Callable[..., Any]


@pytest.fixture(scope="module")
def fitting(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A copy of the trained run with lively random weights of a shape that the loop knows."""

    def make(**fields: Any) -> Path:
        place = tmp_path_factory.mktemp("fitting") / "run"
        shutil.copytree(trained, place, symlinks=True)
        run = cllm.load(place)
        shape = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "context": 24}
        shape |= {"n_layers": 2, "vocab_size": run.config.model.vocab_size, "preset": None} | fields
        model = run.config.model.model_copy(update=shape)
        text = (place / "run.toml").read_text()
        from cllm.core.settings import to_toml

        (place / "run.toml").write_text(to_toml(run.config.model_copy(update={"model": model})))
        assert (place / "run.toml").read_text() != text
        made = Transformer(ModelConfig(**model.model_dump()))
        generator = torch.Generator().manual_seed(3)
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.3 * noise + (1.0 if parameter.dim() == 1 else 0.0))
        saved = checkpoints.load(place, "best")
        checkpoints.save(
            place,
            saved.step + 1,
            weights=dict(made.state_dict()),
            optimizer={},
            state=saved.state,
            keep_last=2,
            best=True,
        )
        return place

    return make


SAMPLINGS = [
    Sampling(max_tokens=70, temperature=0.0),
    Sampling(max_tokens=70, seed=4),
    Sampling(max_tokens=1, seed=4),
    Sampling(max_tokens=33, top_k=0, top_p=0.8, seed=2**40 + 1),
    Sampling(max_tokens=33, top_k=0, min_p=0.1, temperature=1.5, seed=9),
]


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False}], ids=str)
def test_it_writes_what_the_engine_writes(
    fields: dict, library: Path, fitting: Callable[..., Path]
) -> None:
    path = fitting(**fields)
    direct, run = load_direct(path), cllm.load(path)
    assert direct is not None
    engine = run.engine()
    torch.set_num_threads(1)
    assert engine.native is not None
    for prompt in ("", "The old dog", "x" * 200):  # the last is longer than the context
        for sampling in SAMPLINGS:
            ours = "".join(direct.write(prompt, sampling))
            assert ours == "".join(run.stream(prompt, sampling, engine=engine))
    whole = "".join(direct.write("The", SAMPLINGS[0]))
    stop = whole[10:13]
    stopped = Sampling(max_tokens=70, temperature=0.0, stop=(stop,))
    assert "".join(direct.write("The", stopped)) == whole[: whole.index(stop)]


def test_a_text_ends_at_the_end_token(library: Path, fitting: Callable[..., Path]) -> None:
    direct = load_direct(fitting())
    assert direct is not None
    tokens = [t for burst in direct._bursts([1, 2], SAMPLINGS[0]) for t in burst]
    assert len(tokens) == 70
    direct.tokenizer.end_id = tokens[11]
    ended = [t for burst in direct._bursts([1, 2], SAMPLINGS[0]) for t in burst]
    assert ended == tokens[: tokens.index(tokens[11])]


def test_damaged_weights_are_noticed(library: Path, fitting: Callable[..., Path]) -> None:
    direct = load_direct(fitting())
    assert direct is not None
    direct._loop._held[0]["gain"][3] = np.nan
    with pytest.raises(NonFiniteLogitsError, match="its weights are damaged"):
        list(direct.write("The", Sampling()))


def test_what_it_does_not_know_is_left_to_the_engine(
    library: Path, fitting: Callable[..., Path], trained: Path, tmp_path: Path
) -> None:
    assert load_direct(tmp_path / "none") is None
    assert load_direct(fitting(norm="layernorm")) is None
    assert load_direct(fitting(embedding=EmbeddingConfig(kind="reduced", rank=16))) is None
    path = fitting()
    assert isinstance(load_direct(path), Direct)
    weights = checkpoints.find(path, "best") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert load_direct(path) is None
    library.unlink()
    assert load_direct(fitting()) is None
    compile_library()


def test_a_seed_draws_what_torch_draws_with_it() -> None:
    for seed in (0, 1, 2**32 + 5, 2**63 - 1):
        generator = torch.Generator().manual_seed(seed)
        drawn = list(islice(uniforms(Sampling(seed=seed)), 9))
        assert drawn == [uniform(generator) for _ in range(9)]


def test_rotary_tables_are_the_models() -> None:
    ours, theirs = rotary_arrays(16, 40, 500.0), rotary_tables(16, 40, 500.0)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-7)


def test_the_command_imports_no_torch_where_the_loop_is_compiled(
    library: Path, fitting: Callable[..., Path]
) -> None:
    code = (
        "import sys; from cllm.cli import app; "
        f"sys.argv = ['cllm', 'generate', {str(fitting())!r}, '--max-tokens', '3']; "
        "app(standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert "compiled decoding loop" in done.stderr


def test_compiling_for_auto_measures_with_the_loop_as_generating_does(
    library: Path,
    fitting: Callable[..., Path],
    cllm: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_loop: dict[str, bool] = {}

    def measured(engine: Engine) -> float:
        by_loop[engine.options.weights] = engine._native is not None
        return {"fp32": 1.0, "bf16": 2.0, "int8": 3.0}[engine.options.weights]

    monkeypatch.setattr("cllm.infer.measure._step_seconds", measured)
    result = cllm("compile", fitting(), "--weights", "auto")
    assert result.code == 0, result.err
    assert by_loop == {"fp32": True, "bf16": False, "int8": False}
    assert result.out.strip() == str(library)


def test_auto_measures_weights_as_they_would_run(
    library: Path, fitting: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_loop: dict[str, bool] = {}

    def measured(engine: Engine) -> float:
        by_loop[engine.options.weights] = engine._native is not None
        return 1.0

    monkeypatch.setattr("cllm.infer.measure._step_seconds", measured)
    run = cllm.load(fitting())
    run.engine(weights="auto")
    assert by_loop == {"fp32": True, "bf16": False, "int8": False}
    run.engine(weights="auto", compiled=False)
    assert by_loop == {"fp32": False, "bf16": False, "int8": False}
