"""One text by the compiled loop alone, without torch: importing that takes longer than all the rest.

It writes what an engine of one slot with the same loop writes (a test compares them). Models, options and
files that are not the usual ones are for the engine, which also says what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cllm.core.cpu import team_threads
from cllm.core.errors import UserError
from cllm.core.model_config import ModelConfig
from cllm.core.settings import load_whole
from cllm.infer.loop import Loop, LoopWeights, library, unknown_shape
from cllm.infer.request import BURST, Sampling, prompt_ids, refuse_unless
from cllm.infer.streaming import TextStream
from cllm.store.arrays import load_arrays
from cllm.store.run import RunDirectory
from cllm.text.tokenizer import Tokenizer


class Direct:
    """A run ready to write one text at a time. ``line`` tells how it runs."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, loop: Loop) -> None:
        self.config, self.tokenizer, self._loop = config, tokenizer, loop
        self.capacity = config.context
        self.line = f"compiled decoding loop, {loop.choose_threads()}"

    def write(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """What comes after ``prompt``, piece by piece, never a character cut in two.

        ``sampling`` without repetition penalty and log-probabilities (``fits``). Raises ``UserError`` for
        a prompt that is no UTF-8, and ``NonFiniteLogitsError``.
        """
        text = TextStream(self.tokenizer, sampling.stop)
        for tokens in self._bursts(prompt_ids(self.tokenizer, prompt), sampling):
            shown = ""
            for token in tokens:
                shown += text.feed(token)
                if text.stopped:
                    break
            if shown:
                yield shown
            if text.stopped:
                return
        rest = text.end()
        if rest:
            yield rest

    def _bursts(self, ids: Sequence[int], sampling: Sampling) -> Iterator[list[int]]:
        """The tokens after ``ids``, up to the end token, some at a time."""
        uniform = uniforms(sampling)
        held = list(ids)[-self.capacity :]
        made = 0
        tokens = [self._read(held, sampling, uniform)]
        while True:
            if tokens[-1] == self.tokenizer.end_id:
                yield tokens[:-1]
                return
            made += len(tokens)
            yield tokens
            if made >= sampling.max_tokens:
                return
            if len(held) == self.capacity:
                # As the engine: the second half is read anew, at positions from 0.
                held = [*held, tokens[-1]][-max(self.capacity // 2, 1) :]
                tokens = [self._read(held, sampling, uniform)]
                continue
            last = tokens[-1]
            steps = min(BURST, self.capacity - len(held), sampling.max_tokens - made)
            numbers = [next(uniform) for _ in range(steps)]
            (tokens,), _, finite = self._loop.write(
                {0: last}, [len(held)], steps, [sampling], numbers, self.tokenizer.end_id
            )
            refuse_unless(finite)
            held += [last, *tokens[:-1]]

    def _read(self, ids: Sequence[int], sampling: Sampling, uniform: Iterator[float]) -> int:
        _, _, finite = self._loop.read(0, ids)
        refuse_unless(finite)
        return self._loop.draw(sampling, next(uniform))


def fits(sampling: Sampling) -> bool:
    """Whether the loop draws so: the rest is asked token by token."""
    return sampling.repetition_penalty == 1 and sampling.logprobs is None


def load_direct(path: Path) -> Direct | None:
    """The run or checkpoint at ``path`` in the compiled loop; none where that was not compiled or does not
    know the model, and where anything is wrong."""
    compiled = library().path()
    if not path.is_dir() or not compiled.is_file():
        return None
    try:
        run = RunDirectory.open(path)
        config = load_whole(run.config).model
        embedding = config.embedding
        if unknown_shape(config) or (embedding.kind, embedding.lattice) != ("dense", "none"):
            return None
        tokenizer = Tokenizer.load(run.tokenizer)
        weights = loop_weights(config, load_arrays(path), tokenizer.vocab_size)
        if weights is None:
            return None
        shape = (1, config.kv_heads, config.context, config.head_dim)
        caches = [np.zeros(shape, np.float32) for _ in range(2 * config.n_layers)]
        return Direct(config, tokenizer, Loop(compiled, config, weights, caches, team_threads()))
    except (UserError, OSError, AttributeError):  # a damaged library lacks its functions
        return None


def loop_weights(
    config: ModelConfig, arrays: dict[str, np.ndarray], tokens: int
) -> LoopWeights | None:
    """The weights of a Llama with a dense table as the loop wants them, scales of norms folded into what
    follows them and the table cut to the tokenizer's ``tokens``; none where ``arrays`` are not those of
    ``config`` in float32."""
    width, kept = config.d_model, config.kv_heads * config.head_dim
    matrices = {
        "attention.qkv": ("attention_norm", config.n_heads * config.head_dim + 2 * kept, width),
        "attention.out": ("", width, width),
        "mlp.gate_up": ("mlp_norm", 2 * config.d_ff, width),
        "mlp.out": ("", width, config.d_ff),
    }
    expected: dict[str, tuple[int, ...]] = {
        "embedding.weight": (config.vocab_size or 0, width),
        "norm.weight": (width,),
    }
    if not config.tie_embeddings:
        expected["head.weight"] = expected["embedding.weight"]
    for number in range(config.n_layers):
        for name, (norm, rows, columns) in matrices.items():
            expected[f"layers.{number}.{name}.weight"] = (rows, columns)
            if norm:
                expected[f"layers.{number}.{norm}.weight"] = (width,)
    if {name: array.shape for name, array in arrays.items()} != expected:
        return None
    if any(array.dtype != np.float32 for array in arrays.values()):
        return None
    layers = []
    for number in range(config.n_layers):
        found = []
        for name, (norm, _, _) in matrices.items():
            matrix = arrays[f"layers.{number}.{name}.weight"]
            if norm:
                matrix = matrix * arrays[f"layers.{number}.{norm}.weight"]
            found += np.split(matrix, 2) if name == "mlp.gate_up" else [matrix]
        layers.append(found)
    cos, sin = rotary_arrays(config.head_dim, config.context, config.rope_theta)
    table = arrays["embedding.weight"][:tokens]
    scores = table if config.tie_embeddings else arrays["head.weight"][:tokens]
    return LoopWeights(table, scores, arrays["norm.weight"], cos, sin, layers)


def rotary_arrays(head_dim: int, length: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """``cllm.model.attention.rotary_tables`` in numpy: cos and sin, each (length, head_dim)."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angle = np.arange(length, dtype=np.float64)[:, None] * frequency
    angle = np.concatenate([angle, angle], axis=-1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def uniforms(sampling: Sampling) -> Iterator[float]:
    """The numbers in [0, 1) of a request: those of ``cllm.infer.sampling.uniform`` with its seed."""
    if sampling.is_greedy:
        while True:
            yield 0.0
    # torch's generator is MT19937 (Matsumoto & Nishimura 1998) with the seed's lower 32 bits, and a float64
    # the lower 53 of 64 bits.
    source = np.random.RandomState(sampling.seed % 2**32)
    while True:
        high, low = map(int, source.randint(0, 2**32, size=2, dtype=np.uint32))
        yield ((high << 32 | low) % 2**53) / 2**53
