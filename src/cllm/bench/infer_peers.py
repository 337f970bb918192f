"""llama.cpp and ONNX Runtime as contestants of ``cllm bench infer``: a process for each, without torch.

Both get the number of threads that was faster for each figure when they were warmed up: one, or all.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cllm.bench.infer_measures import (
    BATCH,
    PROMPT,
    Measures,
    answer,
    fastest,
    prompts,
    whole_texts,
)
from cllm.core.machine import machine
from cllm.export.llama_library import F32, hush


def main() -> None:
    """Answer rounds for one of the two."""
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("llama.cpp", "onnxruntime"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--new", type=int, required=True)
    args = parser.parse_args()
    make = llama_cpp if args.who == "llama.cpp" else onnxruntime
    chosen: dict[str, str] = {}
    answer(
        lambda: best_threads(
            lambda threads: make(args.file, args.vocab, args.context, args.new, threads), chosen
        ),
        lambda: {"threads": chosen},
    )


def best_threads(make: Callable[[int], Measures], chosen: dict[str, str]) -> Measures:
    """The calls of ``make``, each with one thread or with all of them, whichever is faster here.

    ``chosen`` is filled with the number for each figure.
    """
    made = {str(threads): make(threads) for threads in sorted({1, machine().threads})}
    found: Measures = {}
    for name in next(iter(made.values())):
        chosen[name] = fastest({threads: calls[name][1] for threads, calls in made.items()})
        found[name] = made[chosen[name]][name]
    return found


def llama_cpp(path: Path, vocab: int, context: int, new: int, threads: int) -> Measures:
    """llama.cpp by its own batches: cache in float32, a stream of the cache for each text, no flash
    attention (with a float32 cache it was measured to be several times slower)."""
    library = importlib.import_module("llama_cpp")

    hush(library)
    model = library.llama_model_load_from_file(
        str(path).encode(), library.llama_model_default_params()
    )
    ids, texts = prompts(vocab), whole_texts(vocab, context)

    def context_of(slots: int) -> Any:
        wanted = library.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = context * slots, slots
        wanted.n_batch = wanted.n_ubatch = max(PROMPT * slots, texts.size)
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.type_k = wanted.type_v = F32
        wanted.flash_attn_type, wanted.kv_unified = 0, False
        made = library.llama_init_from_model(model, wanted)
        assert made, "llama.cpp made no context"
        return made

    one, many, reading = (context_of(n) for n in (1, BATCH, len(texts)))
    return {
        "first": (1, lambda: _llama_write(library, one, ids[:1], 1, vocab)),
        "decode 1": (new, lambda: _llama_write(library, one, ids[:1], new, vocab)),
        "decode 32": (new * BATCH, lambda: _llama_write(library, many, ids, new, vocab)),
        "prefill": (texts.size, lambda: _llama_write(library, reading, texts, 1, vocab)),
    }


def _llama_write(library: Any, context: Any, ids_st: np.ndarray, new: int, vocab: int) -> None:
    """Read a text into each sequence, then write ``new`` tokens after each, the likeliest ones."""
    slots, length = ids_st.shape
    library.llama_memory_clear(library.llama_get_memory(context), False)
    batch = library.llama_batch_init(ids_st.size, 0, 1)

    def put(number: int, token: int, position: int, slot: int, scored: bool) -> None:
        batch.token[number], batch.pos[number] = token, position
        batch.n_seq_id[number], batch.seq_id[number][0] = 1, slot
        batch.logits[number] = scored

    def likeliest() -> list[int]:
        assert library.llama_decode(context, batch) == 0, "llama.cpp refused a batch"
        logits = library.llama_get_logits(context)
        found: list[int] = np.ctypeslib.as_array(logits, (slots, vocab)).argmax(1).tolist()
        return found

    for number, (slot, place) in enumerate(np.ndindex(slots, length)):
        put(number, int(ids_st[slot, place]), place, slot, place == length - 1)
    batch.n_tokens = ids_st.size
    best = likeliest()
    batch.n_tokens = slots
    for slot in range(slots):
        put(slot, best[slot], length, slot, True)
    for step in range(new - 1):
        for slot in range(slots):
            batch.token[slot], batch.pos[slot] = best[slot], length + step
        best = likeliest()
    library.llama_batch_free(batch)


def onnxruntime(path: Path, vocab: int, context: int, new: int, threads: int) -> Measures:
    """Our export with keys and values in ONNX Runtime, which stay in its own memory between calls."""
    library = importlib.import_module("onnxruntime")

    options = library.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    file = str(path / "model-cached.onnx")
    session = library.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    ids, texts = prompts(vocab), whole_texts(vocab, context)

    def write(ids_st: np.ndarray, count: int) -> None:
        _onnx_write(library, session, ids_st, count)

    return {
        "first": (1, lambda: write(ids[:1], 1)),
        "decode 1": (new, lambda: write(ids[:1], new)),
        "decode 32": (new * BATCH, lambda: write(ids, new)),
        "prefill": (texts.size, lambda: write(texts, 1)),
    }


def _onnx_write(library: Any, session: Any, ids_st: np.ndarray, new: int) -> None:
    value = library.OrtValue.ortvalue_from_numpy
    caches = [item for item in session.get_inputs() if item.name != "input_ids"]
    outputs = [item.name for item in session.get_outputs()]
    shapes = [(len(ids_st), item.shape[1], 0, item.shape[3]) for item in caches]
    past = [value(np.zeros(shape, np.float32)) for shape in shapes]
    for _ in range(new):
        given = {"input_ids": value(np.ascontiguousarray(ids_st))}
        given |= {item.name: part for item, part in zip(caches, past, strict=True)}
        logits, *past = session.run_with_ort_values(outputs, given)
        ids_st = logits.numpy()[:, -1].argmax(-1)[:, None]


if __name__ == "__main__":
    main()
