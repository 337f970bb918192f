"""One contestant of ``cllm bench train``, in a process of its own: the peer's loop or ours."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from cllm.bench.harness import answer_rounds
from cllm.core.allocator import keep_freed_memory
from cllm.core.config import Config
from cllm.core.memory import peak_rss
from cllm.core.settings import merge, parse_setting
from cllm.model.transformer import flops_per_token
from cllm.training.choose import choose, matmul_rates
from cllm.training.pipeline.delayed import Delayed

WARM_UP = 5
VOCABULARY = 4096
Step = Callable[[torch.Tensor, torch.Tensor], object]


def main() -> None:
    """Parse what ``cllm bench train`` asks for, compile, warm up, then measure round by round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("ours", "peer"))
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--give-memory-back", action="store_true")
    parser.add_argument("--bare", action="store_true", help="leave matrix products unmeasured")
    parser.add_argument("--simdlen", type=int, help="Inductor's vector width in bits; 1 is none")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    if args.simdlen is not None:
        import torch._inductor.config as inductor

        inductor.cpp.simdlen = args.simdlen
    changes: dict[str, Any] = {"model.preset": "nano" if args.small else "tiny"}
    changes |= {"model.vocab_size": VOCABULARY, "train.steps": 100_000}
    changes |= dict(map(parse_setting, args.settings))
    config = merge(Config(), changes)
    chosen = choose(config).config.train
    threads, workers = chosen.threads, chosen.parallel.workers
    assert isinstance(threads, int)
    assert isinstance(workers, int)
    torch.set_num_threads(threads)
    drain = nothing
    if args.who == "ours":
        step, drain, dtype = ours(config, args.give_memory_back)
    else:
        if args.keep_memory:
            keep_freed_memory()
        step, dtype = peer(config, args), args.dtype
    rates = {} if args.bare else matmul_rates(threads)
    rates = {name: workers * rate for name, rate in rates.items()}  # each has so many threads
    measure(config, step, dtype, rates, args.steps, drain)


def nothing() -> None:
    """What ends a round where each step has ended by itself."""


def ours(config: Config, give_memory_back: bool) -> tuple[Step, Callable[[], None], str]:
    """The step of ``cllm train``, as it would be chosen here, what ends a round, and the precision."""
    from cllm.training import build as building

    if give_memory_back:
        building.keep_freed_memory = lambda: False
    config = choose(config).config
    model, step = building.build(config)
    model.train()
    rate = config.train.lr
    if config.train.pipeline.mode == "delayed":
        return *in_pipeline(Delayed(step), rate), config.train.dtype
    return lambda ids, targets: step([(ids, targets)], rate), nothing, config.train.dtype


def in_pipeline(delayed: Delayed, rate: float) -> tuple[Step, Callable[[], None]]:
    """A batch in and, once the pipeline is full, a result out; and the drain, as at a checkpoint."""

    def step(ids: torch.Tensor, targets: torch.Tensor) -> None:
        delayed.submit([(ids, targets)], rate)
        if delayed.in_flight > delayed.delay:
            delayed.result()

    def drain() -> None:
        while delayed.in_flight:
            delayed.result()
        delayed.settle()

    return step, drain


def peer(config: Config, args: argparse.Namespace) -> Step:
    """transformers' Llama of the same shape in the usual loop: fused AdamW, clipping at 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=model.d_model,
            intermediate_size=model.d_ff,
            num_hidden_layers=model.n_layers,
            num_attention_heads=model.n_heads,
            num_key_value_heads=model.kv_heads,
            max_position_embeddings=model.context,
            tie_word_embeddings=True,
            attn_implementation=args.attention,
            use_cache=False,
        )
    )
    train = config.train
    optimizer = torch.optim.AdamW(
        llama.parameters(),
        lr=train.lr,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        fused=True,
    )
    forward = torch.compile(llama) if args.compile else llama
    low = args.dtype == "bf16"

    def step(ids: torch.Tensor, targets: torch.Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = forward(input_ids=ids, shift_labels=targets, labels=targets)
        logits.loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(logits.loss.detach())

    return step


def measure(
    config: Config,
    step: Step,
    dtype: str,
    rates: dict[str, float],
    steps: int,
    drain: Callable[[], None] = nothing,
) -> None:
    """Start, warm up, and answer rounds with tokens a second, each up to the end of ``drain``."""
    batch, context = config.train.batch_size, config.model.context
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(VOCABULARY, (steps, batch, context + 1), generator=generator)
    begin = time.perf_counter()
    step(text[0, :, :-1].contiguous(), text[0, :, 1:].contiguous())
    start_seconds = time.perf_counter() - begin
    for _ in range(WARM_UP):
        step(text[0, :, :-1].contiguous(), text[0, :, 1:].contiguous())
    drain()

    def one_round() -> dict[str, Any]:
        begin = time.perf_counter()
        for window in text:
            step(window[:, :-1].contiguous(), window[:, 1:].contiguous())
        drain()
        seconds = time.perf_counter() - begin
        return {"tokens_per_second": steps * batch * context / seconds, "peak_rss": peak_rss()}

    model = config.model
    ready = {
        "start_seconds": start_seconds,
        "dtype": dtype,
        "flops_per_token": flops_per_token(model),
        "matmul": rates,
        "shape": f"d={model.d_model}, {model.n_layers} layers, {model.n_heads} heads, feed-forward "
        f"{model.d_ff}, context {context}, vocabulary {VOCABULARY}, batch {batch}",
    }
    answer_rounds(ready, one_round)


if __name__ == "__main__":
    main()
