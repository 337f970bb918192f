"""One contestant of ``cllm bench infer``, a process of its own: ours or a peer, with one run's weights."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cllm.bench.infer_measures import BATCH, Measures, answer, prompts, whole_texts
from cllm.core.config import Config
from cllm.core.machine import machine
from cllm.core.settings import load_config
from cllm.export.hf import config_json
from cllm.export.llama import as_llama as llama_tensors
from cllm.export.source import plain
from cllm.infer.batching import Request, serve
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.native import compile_library, load_native
from cllm.infer.sampling import Sampling
from cllm.model.restored import restored
from cllm.model.transformer import Transformer
from cllm.store.checkpoint import load_weights
from cllm.store.run import RunDirectory


@dataclass(frozen=True)
class Trained:
    """A run's configuration and model."""

    config: Config
    model: Transformer


def trained(path: Path) -> Trained:
    """The run at ``path`` in eval mode, on the threads that this machine has."""
    torch.set_num_threads(machine().threads)
    config = load_config(RunDirectory.open(path).config)
    return Trained(config, restored(config.model, load_weights(path), path))


def main() -> None:
    """Make the contestant ready (compiled, warm), then answer rounds with tokens a second."""
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("compiled", "eager", "transformers", "transformers-static"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--new", type=int, default=100, help="tokens to write after the prompt")
    args = parser.parse_args()
    torch.manual_seed(0)
    run = trained(args.run)

    def make() -> Measures:
        if args.who.startswith("transformers"):
            return theirs(run, args.new, static=args.who.endswith("static"))
        return ours(run, args.new, compiled=args.who == "compiled")

    with torch.no_grad():
        answer(make)


def prompts_of(run: Trained) -> torch.Tensor:
    """(BATCH, PROMPT) token ids."""
    assert run.config.model.vocab_size is not None
    return torch.from_numpy(prompts(run.config.model.vocab_size))


def texts_of(run: Trained) -> torch.Tensor:
    """(texts, context) ids, 512 in all."""
    assert run.config.model.vocab_size is not None
    return torch.from_numpy(whole_texts(run.config.model.vocab_size, run.config.model.context))


def ours(run: Trained, new: int, *, compiled: bool) -> Measures:
    """Our engine."""
    texts = texts_of(run).tolist()
    one, many, reading = (Engine(run.model, EngineOptions(slots=n)) for n in (1, BATCH, len(texts)))
    if compiled:
        compile_library()
    for engine in (one, many, reading):
        if compiled:
            engine.native, line = load_native(engine)
            assert engine.native is not None, line
        engine.use_compiled(compiled)
    sampling = Sampling(max_tokens=new, temperature=0.0)
    requests = [Request(ids, sampling) for ids in prompts_of(run).tolist()]
    first = [Request(requests[0].ids, Sampling(max_tokens=1, temperature=0.0))]
    return {
        "first": (1, lambda: list(serve(one, first))),
        "decode 1": (new, lambda: list(serve(one, requests[:1]))),
        "decode 32": (new * BATCH, lambda: list(serve(many, requests))),
        "prefill": (
            sum(map(len, texts)),
            lambda: [reading.start(slot, text) for slot, text in enumerate(texts)],
        ),
    }


def theirs(run: Trained, new: int, *, static: bool) -> Measures:
    """``generate`` of transformers' Llama with our weights; ``static``: static cache, compiled forward."""
    llama = as_llama(run)
    options: dict[str, Any] = {"do_sample": False}
    if static:
        llama.forward = torch.compile(llama.forward)
        options["cache_implementation"] = "static"
    ids = prompts_of(run)
    texts = texts_of(run)

    def write(given: torch.Tensor, count: int = new) -> object:
        length = {"min_new_tokens": count, "max_new_tokens": count}
        return llama.generate(given, attention_mask=torch.ones_like(given), **options, **length)

    return {
        "first": (1, lambda: write(ids[:1], 1)),
        "decode 1": (new, lambda: write(ids[:1])),
        "decode 32": (new * BATCH, lambda: write(ids)),
        "prefill": (texts.numel(), lambda: llama(texts, logits_to_keep=1, use_cache=True)),
    }


def as_llama(run: Trained) -> Any:
    """A ``LlamaForCausalLM`` as ``cllm export --to hf`` makes it of the run; nothing ends a text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = llama_tensors(plain(run.model))
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    llama = LlamaForCausalLM(LlamaConfig.from_dict(config_json(made, 0, "float32") | ends)).eval()
    tied = {"lm_head.weight": made.tensors["model.embed_tokens.weight"]}
    llama.load_state_dict(tied | made.tensors)
    return llama


if __name__ == "__main__":
    main()
