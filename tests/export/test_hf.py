"""``hf``: transformers loads the directory and gives the same logits and tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cllm.core.errors import UserError
from cllm.export import hf
from cllm.export.check import CheckFailedError, check, random_texts
from cllm.export.model_card import model_card
from cllm.export.source import Source, open_source
from cllm.store import checkpoint as checkpoints

pytest.importorskip("transformers")

SourceOf = Callable[..., Source]
Exported = Callable[..., tuple[Path, Any]]


def test_each_kind_of_model_is_held_or_refused(
    kind: str, source_of: SourceOf, exported: Exported, refused: dict[str, set[str]]
) -> None:
    source = source_of(kind)
    if kind in refused["hf"]:
        with pytest.raises(
            UserError, match=r"hf \(LlamaForCausalLM\) cannot hold model\..*: .*export"
        ):
            exported(source, "hf")
        return
    path, _ = exported(source, "hf")
    # Against the model itself, whose table is not worked out.
    found = check(hf.open_runtime(path), source.model, source)
    assert found.difference <= 1e-4
    assert found.texts > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_is_stored_rounded_once(
    dtype: str, source_of: SourceOf, exported: Exported
) -> None:
    source = source_of()
    path, model = exported(source, "hf", dtype)
    check(hf.open_runtime(path), model, source)
    with pytest.raises(CheckFailedError):
        check(hf.open_runtime(path), source.model, source)
    stored = load_file(path / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{hf.DTYPES[dtype]}"}


def test_tied_table_is_stored_once_and_stays_tied(source_of: SourceOf, exported: Exported) -> None:
    import transformers

    for kind, tied in (("plain", True), ("untied", False)):
        path, _ = exported(source_of(kind), "hf")
        assert ("lm_head.weight" in load_file(path / "model.safetensors")) is not tied
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_a_wrong_weight_fails_the_check(source_of: SourceOf, exported: Exported) -> None:
    source = source_of()
    path, model = exported(source, "hf")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] += 0.1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailedError, match="logits differ from the model's"):
        check(hf.open_runtime(path), model, source)


def test_a_wrong_merge_fails_the_check(source_of: SourceOf, exported: Exported) -> None:
    source = source_of()
    path, model = exported(source, "hf")
    file = path / "tokenizer.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    del description["model"]["merges"][3]
    file.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(CheckFailedError, match="the tokens of"):
        check(hf.open_runtime(path), model, source)


def test_greedy_generation_is_ours(source_of: SourceOf, exported: Exported) -> None:
    import transformers

    from cllm.infer.generate import generate
    from cllm.infer.sampling import Sampling

    source = source_of()
    path, _ = exported(source, "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for text in list(random_texts(source, 40))[::4]:
        ids = tokenizer(text[:8], return_tensors="pt")["input_ids"]
        theirs = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :].tolist()
        ours = generate(source.model, ids[0].tolist(), Sampling(max_tokens=8, temperature=0))
        end = source.tokenizer.end_id
        assert (theirs[: theirs.index(end)] if end in theirs else theirs) == [
            *ours[: ours.index(end) if end in ours else None]
        ]


def test_generation_defaults_are_those_of_cllm(source_of: SourceOf, exported: Exported) -> None:
    from cllm.infer.sampling import Sampling

    path, _ = exported(source_of(), "hf")
    written = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    ours = Sampling()
    for theirs, name in (
        ("temperature", "temperature"),
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("max_new_tokens", "max_tokens"),
    ):
        assert written[theirs] == getattr(ours, name)


def test_the_card_of_an_earlier_checkpoint_has_no_figures_of_the_best(trained: Path) -> None:
    best = checkpoints.find(trained, "best")
    others = [p for p in (trained / "checkpoints").glob("step-*") if p.name != best.name]
    assert others
    for path in (trained, best, *others):
        source = open_source(path)
        card = model_card(source, "fp32", {})
        assert f"Checkpoint: {(best if path == trained else path).name}" in card
        assert "the run trained 40 steps" in card
        assert ("bits per byte" in card) == (path not in others)


def test_model_card_has_the_facts_of_the_run_and_no_others(
    source_of: SourceOf, exported: Exported
) -> None:
    source = source_of()
    path, _ = exported(dataclasses.replace(source, facts={"validation_bpb": 1.98768}), "hf")
    card = (path / "README.md").read_text(encoding="utf-8")
    assert "1.9877 bits per byte" in card
    assert f"{sum(p.numel() for p in source.model.parameters()):,}" in card
    assert "Test" not in card
    assert "license" not in card


def test_weights_beyond_half_precision_are_refused(source_of: SourceOf, exported: Exported) -> None:
    source = source_of()
    with torch.no_grad():
        source.model.layers[0].mlp.out.weight[0, 0] = 1e6
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.out\.weight leaves the range of float16"):
        exported(source, "hf", "fp16")
