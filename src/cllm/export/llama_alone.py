"""Has llama.cpp compute once, in a process that it may end: ``python -I llama_alone.py FILE CONTEXT``.

The parent runs this file by its path; it must not import cllm.
"""

import sys

import llama_cpp


def main(path: str, context: int) -> None:
    """A whole context at once, then a single token: the two go through different code. The cache is in
    float32 (type 0), as the parent's will be."""
    model = llama_cpp.Llama(
        path,
        n_ctx=context,
        n_batch=context,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=0,
        type_v=0,
        verbose=False,
    )
    model.eval([0] * (context - 1))
    model.eval([0])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
