"""The bench of inference: it runs with the peers that are installed, and its claims compare figures."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cllm.bench import infer, infer_contestant
from cllm.bench.harness import Options, render
from cllm.bench.infer_measures import PREFILL, fastest, whole_texts
from cllm.export import export as exporter
from cllm.store.run import RunDirectory


def test_a_claim_compares_the_compiled_step_with_its_peer() -> None:
    figures = {
        "compiled": {"decode 1": 100.0, "decode 32": 900.0},
        "transformers": {"decode 1": 10.0, "decode 32": 50.0},
        "llama.cpp": {"decode 1": 200.0, "decode 32": 300.0},
    }
    values = {claim.name: (claim.value, claim.holds) for claim in infer.speed_claims(figures)}
    assert values == {
        "demo, batch 1: × transformers eager": (10.0, True),
        "demo, batch 1: × llama.cpp": (0.5, False),
        "demo, batch 32: × llama.cpp": (3.0, True),
    }
    del figures["llama.cpp"]
    claims = infer.speed_claims(figures)
    assert [c.holds for c in claims] == [True, None, None]
    assert claims[1].why == "llama_cpp is not installed"


def test_what_is_read_at_once_is_512_tokens_in_texts_of_the_context() -> None:
    assert whole_texts(9, 128).shape == (4, 128)
    assert whole_texts(9, 256).shape == (2, 256)
    assert whole_texts(9, 4096).shape == (1, PREFILL)
    assert np.array_equal(whole_texts(9, 64), whole_texts(9, 64))


def test_the_faster_call_is_taken() -> None:
    def slow() -> None:
        sum(range(200_000))

    assert fastest({"1": slow, "2": lambda: None}) == "2"


def test_exports_of_another_version_of_the_exporters_are_made_anew(
    trained: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = isolated / "run"
    shutil.copytree(trained, run, symlinks=True)
    asked = []

    def export(path: Path, to: str, *, out: Path, checking: bool) -> None:
        asked.append(out)
        out.parent.mkdir(exist_ok=True)
        out.write_text(to)

    monkeypatch.setattr("cllm.export.export.export", export)
    (run / "export").mkdir()
    (run / "export" / "bench-gguf.gguf").write_text("of an older version")
    place = infer.exported(run, "gguf")
    assert place.name.endswith(".gguf")
    assert [path.name for path in (run / "export").iterdir()] == [place.name]
    assert infer.exported(run, "gguf") == place
    source = isolated / "exporters"
    shutil.copytree(Path(exporter.__file__).parent, source)
    (source / "gguf.py").write_text("# changed")
    monkeypatch.setattr(exporter, "__file__", str(source / "export.py"))
    assert infer.exported(run, "gguf") != place
    assert len(asked) == 2


def test_the_peers_model_is_ours(trained: Path) -> None:
    pytest.importorskip("transformers")
    run = infer_contestant.trained(trained)
    torch.set_num_threads(1)
    ids = infer_contestant.prompts_of(run)
    with torch.no_grad():
        theirs = infer_contestant.as_llama(run)(ids).logits
        assert torch.allclose(theirs, run.model(ids), atol=1e-4)


@pytest.mark.slow
def test_quick_measures_all_that_are_installed_and_judges_nothing(
    trained: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = isolated / "reference"
    shutil.copytree(trained, place, symlinks=True)
    # Reference runs have tests of their own.
    monkeypatch.setattr(infer, "reference_run", lambda config: RunDirectory.open(place))
    result = infer.run(Options(quick=True))
    there = ["eager"] + [
        who
        for who, (package, _) in infer.PACKAGES.items()
        if who != "transformers-static" and importlib.util.find_spec(package)
    ]
    assert [row["who"] for row in result.rows] == [infer.NAMES[who] for who in there]
    wanted = (*infer.FIGURES, infer.FIRST)
    assert all(row[name] > 0 for row in result.rows for name in wanted)
    assert [claim.holds for claim in result.claims] == [None] * 5
    assert all(claim.why for claim in result.claims), "--quick, or a busy machine"
    assert "llama.cpp by its batch interface" in render(result)
