"""The README of an exported directory: what the run knows about itself, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cllm.export.source import Source


def model_card(source: Source, dtype: str, tensors: dict[str, Tensor]) -> str:
    """Markdown with the Hub's front matter. What the run did not record is not in it."""
    config = source.config
    numbers = sum(tensor.numel() for tensor in tensors.values())
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [cllm, llama]",
        "---",
        "",
        f"# {source.name}",
        "",
        "A language model trained and exported by Crystalline (cllm). Licence, languages and intended use "
        "are for its owner to write here.",
        "",
        f"- Parameters: {numbers:,} stored as {dtype}",
        f"- Layers {config.n_layers}, width {config.d_model}, heads {config.n_heads} "
        f"(key/value {config.kv_heads}), feed-forward {config.d_ff}, vocabulary {config.vocab_size}",
        f"- Context: {config.context} tokens; it was trained on no longer ones",
        *_facts(source.facts),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'ids = tokenizer("Once", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(ids)[0], skip_special_tokens=True))",
        "```",
        "",
        "Each text begins with the end token, as in training; the tokenizer puts it there.",
    ]
    return "\n".join(lines) + "\n"


def _facts(facts: dict[str, Any]) -> list[str]:
    lines = []
    corpus = facts.get("corpus") or {}
    if "bytes" in corpus:
        lines.append(
            f"- Corpus: {corpus['bytes']:,} bytes of text, {corpus.get('documents', 0):,} documents"
        )
    if "step" in facts:
        tokens = facts.get("tokens", 0)
        lines.append(f"- Training: the run trained {facts['step']:,} steps, {tokens:,} tokens")
    if "checkpoint" in facts:
        lines.append(f"- Checkpoint: {facts['checkpoint']}")
    for split in ("validation", "test"):
        bpb = facts.get(f"{split}_bpb")
        if bpb is not None:
            lines.append(f"- {split.title()}: {bpb:.4f} bits per byte (before the export)")
    if "versions" in facts:
        made = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines.append(f"- Trained with {made}")
    return lines
