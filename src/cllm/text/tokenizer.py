"""The tokenizer: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), lossless on any bytes.

Hugging Face ``tokenizers`` trains and applies it, with exactly GPT-2's pre-tokenizer pattern; the
file is an ordinary ``tokenizer.json``. What is added here: text that looks like a special token stays
text, bytes that are no UTF-8 have tokens too, and a tokenizer that would lose bytes is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from cllm.core.atomic import write_text
from cllm.core.errors import UsageError, UserError
from cllm.text.decode import utf8_runs
from cllm.text.lossless import end_token, refuse_lossy, token_table

END_TOKEN = "<|endoftext|>"
BYTES = 256


class Tokenizer:
    """A trained tokenizer; immutable.

    ``end_id`` is the token that separates documents and begins every stream. It and the other
    special tokens have no bytes: ``decode`` leaves them out, and ``encode`` never makes one.
    """

    def __init__(self, backend: tokenizers.Tokenizer, origin: str = "tokenizer") -> None:
        """Wrap a ``tokenizers.Tokenizer``; raise ``UserError`` if it is not lossless (``origin`` is
        the name it goes by in that message)."""
        description = json.loads(backend.to_str())
        refuse_lossy(description, origin)
        backend.no_truncation()
        backend.no_padding()
        self._json = backend.to_str(pretty=True)
        # Not kept in the file: without it, a text that mentions "<|endoftext|>" would end a document.
        backend.encode_special_tokens = True
        self._backend = backend
        self._bytes, self.special_ids = token_table(description)
        self.end_id = end_token(description, origin)
        self._byte_ids = np.full(BYTES, -1, dtype=np.int32)
        for index, piece in enumerate(self._bytes):
            if len(piece) == 1 and index not in self.special_ids:
                self._byte_ids[piece[0]] = index
        assert (self._byte_ids >= 0).all()
        self._refuse_failing_round_trip(origin)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
    ) -> Tokenizer:
        """Train on an iterator of texts, whose words are counted as they pass (memory grows with
        the distinct words, not with the text).

        ``vocab_size`` includes the 256 bytes, ``<|endoftext|>`` (id 0) and ``special_tokens``. Fewer
        tokens come out when fewer pairs occur at least twice. The same texts give the same tokenizer,
        in whatever order they come. Raises ``UsageError`` for a size that cannot hold the bytes and the
        special tokens.
        """
        specials = [END_TOKEN, *(t for t in special_tokens if t != END_TOKEN)]
        if len(set(specials)) < len(specials) or not all(specials):
            raise UsageError("tokenizer.special_tokens holds an empty or repeated token")
        if vocab_size < BYTES + len(specials):
            raise UsageError(
                f"tokenizer.vocab_size = {vocab_size} cannot hold the 256 bytes and "
                f"{len(specials)} special tokens; set at least {BYTES + len(specials)}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,  # a pair seen once says nothing about other texts
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer=trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``. Raises ``UserError`` if it is missing, is not one, is not
        byte-level and lossless, or has no end token."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise UserError(f"there is no tokenizer file {path}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the tokenizer file {path}: {error}") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, origin: str = "tokenizer") -> Tokenizer:
        """The same from the text of such a file; ``origin`` names it in messages."""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{origin} is not a tokenizer.json: {error}") from error
        return cls(backend, origin)

    def renumbered(self, new_ids: np.ndarray) -> Tokenizer:
        """The same tokenizer with id i called ``new_ids[i]``, a permutation (V,) int64.

        Raises ``ValueError`` if it is none, if ids have gaps, or if a special token's id would change
        (the rest of the file may refer to it).
        """
        new_ids, size = np.asarray(new_ids), self.vocab_size
        if not np.array_equal(np.sort(new_ids), np.arange(size)):
            raise ValueError(
                f"new_ids of shape {new_ids.shape} must be a permutation of {size} ids"
            )
        if any(new_ids[i] != i for i in self.special_ids):
            raise ValueError("special tokens must keep their ids")
        description = json.loads(self._json)
        vocab = description["model"]["vocab"]
        if len({*vocab.values(), *self.special_ids}) != size:
            raise ValueError("a tokenizer whose ids have gaps cannot be renumbered")
        vocab.update({name: int(new_ids[i]) for name, i in vocab.items()})
        for token in description["added_tokens"]:
            token["id"] = int(new_ids[token["id"]])
        return Tokenizer.from_json(json.dumps(description, ensure_ascii=False))

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json`` (atomically)."""
        write_text(Path(path), self._json)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the file that ``save`` writes."""
        return hashlib.sha256(self._json.encode("utf-8")).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that a token table needs."""
        return len(self._bytes)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The wrapped object, for exports. Its ``encode`` is safe, its ``decode`` is not lossless."""
        return self._backend

    def to_json(self) -> str:
        """What ``save`` writes."""
        return self._json

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids. Never a special token, whatever the text looks like."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Many texts at once, on all threads that the machine grants."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
                raise UserError(
                    "the text holds a lone surrogate (half a character); remove it"
                ) from error
            raise
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Any bytes -> int32 ids; where they are no UTF-8, one token a byte."""
        try:
            return self.encode(data.decode("utf-8"))
        except UnicodeDecodeError:
            runs = list(utf8_runs(data))
        texts = [data[start:end].decode("utf-8") for start, end, kind in runs if kind == "text"]
        encoded = iter(self.encode_batch(texts))
        parts = [
            next(encoded)
            if kind == "text"
            else self._byte_ids[np.frombuffer(data[start:end], dtype=np.uint8)]
            for start, end, kind in runs
        ]
        return np.concatenate(parts)

    def encode_with_spans(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Text -> (int32 ids, bool mask of the tokens inside the character ranges ``spans``).

        The text is cut at the edges of the spans before it is encoded, as it is in generation, where
        the prompt is encoded without its answer: no token straddles an edge.
        """
        ids: list[np.ndarray] = []
        mask: list[np.ndarray] = []
        for start, end, counts in segments(len(text), spans):
            ids.append(self.encode(text[start:end]))
            mask.append(np.full(len(ids[-1]), counts))
        if not ids:
            return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool)
        return np.concatenate(ids), np.concatenate(mask)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; none for a special one."""
        return self._bytes[token]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> exactly the bytes that were encoded; special tokens have none."""
        return b"".join([self._bytes[int(i)] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text. Ids that stop inside a character show as U+FFFD: ``decode_bytes`` is exact."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids."""
        return {self.token_name(i): i for i in sorted(self.special_ids)}

    def token_name(self, token: int) -> str:
        """The token as the file spells it (GPT-2's byte alphabet), for display."""
        return str(self._backend.id_to_token(token))

    def merges(self) -> list[tuple[str, str]]:
        """The BPE merges in order, in the file's spelling."""
        return [_pair(merge) for merge in json.loads(self._json)["model"]["merges"]]

    def _refuse_failing_round_trip(self, origin: str) -> None:
        probe = " A  naïve\r\n\n\t日本語 \U0001f600\x00'll <|endoftext|>  </s> 1234 " + "".join(
            map(chr, range(1, 512))
        )
        if self.decode_bytes(self.encode(probe)) != probe.encode("utf-8"):
            raise UserError(f"{origin} does not give a text back exactly; train one instead")


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def segments(length: int, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    """Cut ``range(length)`` at the edges of ascending ``spans``: (start, end, inside), none empty."""
    here = 0
    for start, end in spans:
        if here < start:
            yield here, start, False
        if start < end:
            yield start, end, True
        here = end
    if here < length:
        yield here, length, False
