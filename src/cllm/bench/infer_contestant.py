"""One contestant of ``cllm bench infer``, a process of its own: ours or a peer, with one run's weights."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cllm.bench.harness import answer_rounds
from cllm.core.config import Config
from cllm.core.machine import machine
from cllm.core.memory import peak_rss
from cllm.core.settings import load_config
from cllm.infer.artifact import artifact_path, compile_decode, load_decode
from cllm.infer.batching import Request, serve
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.sampling import Sampling
from cllm.model.transformer import Transformer
from cllm.store.checkpoint import load_weights
from cllm.store.run import RunDirectory

PROMPT, BATCH = 16, 32


@dataclass(frozen=True)
class Trained:
    """A run's configuration and model, and where its compiled steps lie."""

    config: Config
    model: Transformer
    compiled: Path


def trained(path: Path) -> Trained:
    """The run at ``path`` in eval mode, on the threads that this machine has."""
    torch.set_num_threads(machine().threads)
    config = load_config(RunDirectory.open(path).config)
    model = Transformer(config.model)
    model.load_state_dict(load_weights(path))
    return Trained(config, model.eval(), path / "compiled")


Measures = dict[str, tuple[int, Callable[[], object]]]
"""Name of a figure: tokens of one call, and the call."""


def main() -> None:
    """Make the contestant ready (compiled, warm), then answer rounds with tokens a second."""
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("compiled", "eager", "transformers", "transformers-static"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--new", type=int, default=100, help="tokens to write after the prompt")
    args = parser.parse_args()
    torch.manual_seed(0)
    run = trained(args.run)
    begin = time.perf_counter()
    with torch.no_grad():
        if args.who.startswith("transformers"):
            measures = theirs(run, args.new, static=args.who.endswith("static"))
        else:
            measures = ours(run, args.new, compiled=args.who == "compiled")
        for _, call in measures.values():
            call()
        ready = {"start_seconds": time.perf_counter() - begin}

        def one_round() -> dict[str, Any]:
            figures: dict[str, Any] = {"peak_rss": peak_rss()}
            for name, (tokens, call) in measures.items():
                begin = time.perf_counter()
                call()
                figures[name] = tokens / (time.perf_counter() - begin)
            return figures

        answer_rounds(ready, one_round)


def prompts_of(run: Trained) -> torch.Tensor:
    """(BATCH, PROMPT) token ids."""
    assert run.config.model.vocab_size is not None
    generator = torch.Generator().manual_seed(1)
    return torch.randint(run.config.model.vocab_size, (BATCH, PROMPT), generator=generator)


def ours(run: Trained, new: int, *, compiled: bool) -> Measures:
    """Our engine; its compiled steps are kept beside the run."""
    one, many = (Engine(run.model, EngineOptions(slots=n)) for n in (1, BATCH))
    for engine in (one, many):
        if compiled:
            if not artifact_path(engine, run.compiled).is_file():
                compile_decode(engine, run.compiled)
            engine.compiled, line = load_decode(engine, run.compiled)
            assert engine.compiled is not None, line
        engine.use_compiled(compiled)
    sampling = Sampling(max_tokens=new, temperature=0.0)
    requests = [Request(ids, sampling) for ids in prompts_of(run).tolist()]
    whole = (prompts_of(run).flatten().tolist() * 99)[: one.capacity]
    return {
        "decode 1": (new, lambda: list(serve(one, requests[:1]))),
        "decode 32": (new * BATCH, lambda: list(serve(many, requests))),
        "prefill": (one.capacity, lambda: one.start(0, whole)),
    }


def theirs(run: Trained, new: int, *, static: bool) -> Measures:
    """``generate`` of transformers' Llama with our weights; ``static``: static cache, compiled forward."""
    llama = as_llama(run)
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
    if static:
        llama.forward = torch.compile(llama.forward)
        options["cache_implementation"] = "static"
    prompts = prompts_of(run)
    context = run.config.model.context
    whole = prompts.flatten().repeat(99)[None, :context]

    def write(ids: torch.Tensor) -> object:
        return llama.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return {
        "decode 1": (new, lambda: write(prompts[:1])),
        "decode 32": (new * BATCH, lambda: write(prompts)),
        "prefill": (context, lambda: llama(whole, logits_to_keep=1, use_cache=True)),
    }


def as_llama(run: Trained) -> Any:
    """A ``LlamaForCausalLM`` of the run's weights (the presets are Llamas)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, model = run.config.model, run.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=None,
            bos_token_id=None,
        )
    ).eval()
    weights = {
        "model.embed_tokens.weight": model.embedding.table(),
        "model.norm.weight": model.norm.weight,
    }
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    heads = [config.n_heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2]
    for number in range(config.n_layers):
        ours, theirs = f"layers.{number}.", f"model.layers.{number}."
        mine = {
            k.removeprefix(ours): v for k, v in model.state_dict().items() if k.startswith(ours)
        }
        for name, rows in zip("qkv", mine["attention.qkv.weight"].split(heads), strict=True):
            weights[f"{theirs}self_attn.{name}_proj.weight"] = rows
        weights[f"{theirs}self_attn.o_proj.weight"] = mine["attention.out.weight"]
        gate, up = mine["mlp.gate_up.weight"].chunk(2)
        weights |= {f"{theirs}mlp.gate_proj.weight": gate, f"{theirs}mlp.up_proj.weight": up}
        weights[f"{theirs}mlp.down_proj.weight"] = mine["mlp.out.weight"]
        weights[f"{theirs}input_layernorm.weight"] = mine["attention_norm.weight"]
        weights[f"{theirs}post_attention_layernorm.weight"] = mine["mlp_norm.weight"]
    llama.load_state_dict(weights)
    return llama


if __name__ == "__main__":
    main()
