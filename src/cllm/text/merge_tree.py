"""The merge tree of a BPE tokenizer: which two tokens each token was merged from, down to bytes.

It stands in for morphology, and is an approximation: BPE merges what is frequent, not what has a
meaning, so that ``' running'`` may well be ``' r'`` + ``'unning'``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cllm.text.lossless import byte_of_character

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from cllm.text.tokenizer import Tokenizer

_SPACE = "\u2581"
"""The character that Metaspace tokenizers write for a space."""


@dataclass(frozen=True, eq=False)
class MergeTree:
    """Tokens and their merges, V tokens in all (one more than the largest id).

    Attributes:
        names: the tokens as the file spells them; empty for an id that no token has.
        texts: the bytes that they stand for; none for special tokens and unused ids.
        parts: (V, 2) int64, the tokens that each was merged from; −1 in a leaf: a byte or character of
            the alphabet, an added or special token, a token that no merge makes.
        ranks: (V,) int64, the place of that merge in the list, 0 the first; −1 in a leaf.
        special: ids of the special tokens.
        sha256: of vocabulary, merges and added tokens (hex), however the file is laid out.
    """

    names: tuple[str, ...]
    texts: tuple[bytes, ...]
    parts: np.ndarray
    ranks: np.ndarray
    special: frozenset[int]
    sha256: str

    @classmethod
    def from_tokenizer(cls, source: Tokenizer | str | Path | Mapping[str, Any]) -> MergeTree:
        """From a ``tokenizer.json`` of Hugging Face ``tokenizers`` (its path, or parsed), or from ours.

        Byte-level vocabularies and those of characters, with or without Metaspace and byte fallback.
        Where several merges make one token, the first one counts.

        Raises:
            ValueError: not a tokenizer, not BPE, no merges, fewer than two tokens, or merges of
                tokens that are not there.
        """
        description, origin = _description(source)
        model, added = description["model"], _added(description, origin)
        names = _names(model["vocab"], origin)
        names |= {token["id"]: token["content"] for token in added}
        _refuse_without_merges(model, len(names), origin)
        merges = [_pair(merge, origin) for merge in model["merges"]]
        size = 1 + max(names)
        special = frozenset(token["id"] for token in added if token["special"])
        plain = {token["id"]: token["content"].encode("utf-8") for token in added}
        texts = _texts(description, names) | plain | dict.fromkeys(special, b"")
        parts, ranks = _parts(model, merges, set(plain), size, origin)
        return cls(
            names=tuple(names.get(i, "") for i in range(size)),
            texts=tuple(texts.get(i, b"") for i in range(size)),
            parts=parts,
            ranks=ranks,
            special=special,
            sha256=_sha256(model, merges, added),
        )

    def __len__(self) -> int:
        return len(self.names)

    def contents(self) -> csr_matrix:
        """(V, V) int64 sparse: how often each token (column) occurs in the tree of each (row), itself
        included.

        With A the matrix of merges this is I + A + A² + …, which ends at the depth of the tree and is
        taken as (I + A)(I + A²)(I + A⁴)…
        """
        from scipy.sparse import csr_matrix, eye_array

        inner = np.flatnonzero(self.parts[:, 0] >= 0)
        rows, columns = np.repeat(inner, 2), self.parts[inner].ravel()
        shape = (len(self), len(self))
        power = csr_matrix((np.ones(len(rows), dtype=np.int64), (rows, columns)), shape=shape)
        total = csr_matrix(eye_array(len(self), dtype=np.int64, format="csr"))
        while power.nnz:
            total = total + total @ power
            power = power @ power
        total.sort_indices()
        return total

    def text(self, token: int) -> str | None:
        """What a token stands for; ``None`` if it is no text (special, or a part of a character)."""
        try:
            return self.texts[token].decode("utf-8") or None
        except UnicodeDecodeError:
            return None


def _description(source: Tokenizer | str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The parsed file, checked to be BPE with merges, and the name it goes by in messages."""
    origin = "the tokenizer"
    if isinstance(source, Mapping):
        found: Any = dict(source)
    elif isinstance(source, str | Path):
        origin = str(source)
        try:
            found = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the tokenizer file {origin}: {error}") from error
    else:
        found = json.loads(source.to_json())
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise ValueError(f"{origin} is not a tokenizer.json of Hugging Face tokenizers")
    return found, origin


def _refuse_without_merges(model: dict[str, Any], tokens: int, origin: str) -> None:
    if tokens < 2:
        raise ValueError(
            f"{origin} has a vocabulary of {tokens}: codes compare tokens; give one of two or more"
        )
    merges = model.get("merges")
    if not merges or not isinstance(merges, list) or not isinstance(model["vocab"], dict):
        raise ValueError(
            f"{origin} has no merge list (its model is {model.get('type', 'unnamed')}): token codes are "
            "made of merges; give a BPE tokenizer, or train a larger one with `cllm tokenizer train`"
        )


def _added(description: dict[str, Any], origin: str) -> list[dict[str, Any]]:
    """Id, content and whether it is special, of each added token."""
    found = []
    for token in description.get("added_tokens") or []:
        known = token if isinstance(token, dict) else {}
        if not _is_id(known.get("id")) or not isinstance(known.get("content"), str):
            raise ValueError(f"{origin} is damaged: {token!r} is no added token; download it anew")
        found.append(
            {
                "id": known["id"],
                "content": known["content"],
                "special": bool(known.get("special", False)),
            }
        )
    return found


def _names(vocab: dict[str, int] | list[Any], origin: str) -> dict[int, str]:
    """Names by id; Unigram files have a list of (name, score)."""
    if isinstance(vocab, list):
        return {i: str(entry[0]) for i, entry in enumerate(vocab) if entry}
    for name, i in vocab.items():
        if not _is_id(i):
            raise ValueError(f"{origin} is damaged: {i!r} is no id of {name!r}; download it anew")
    return {i: name for name, i in vocab.items()}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _pair(merge: Any, origin: str) -> tuple[str, str]:
    """A merge as a pair; files have lists of two, older ones ``"a b"``."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    pair = tuple(parts) if isinstance(parts, list | tuple) else ()
    if len(pair) != 2 or not all(name and isinstance(name, str) for name in pair):
        raise ValueError(f"{origin} has a merge that is no pair of tokens: {merge!r}")
    return pair


def _parts(
    model: dict[str, Any], merges: list[tuple[str, str]], added: set[int], size: int, origin: str
) -> tuple[np.ndarray, np.ndarray]:
    """(V, 2) ids that each token was merged from and (V,) places of the merges, −1 in leaves."""
    ids, prefix = model["vocab"], model.get("continuing_subword_prefix") or ""
    parts, ranks = np.full((size, 2), -1, dtype=np.int64), np.full(size, -1, dtype=np.int64)
    for rank, (left, right) in enumerate(merges):
        whole = left + right.removeprefix(prefix)
        missing = [name for name in (left, right, whole) if name not in ids]
        if missing:
            raise ValueError(
                f"{origin}: the merge {left!r} + {right!r} needs {missing[0]!r}, which is not in its "
                "vocabulary; the file is damaged"
            )
        made = ids[whole]
        if ranks[made] < 0 and made not in added:
            parts[made], ranks[made] = (ids[left], ids[right]), rank
    return parts, ranks


def _texts(description: dict[str, Any], names: dict[int, str]) -> dict[int, bytes]:
    """The bytes that the vocabulary's tokens stand for."""
    model = description["model"]
    steps = [description.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    written = json.dumps(steps, ensure_ascii=False)
    byte_level, metaspace = '"ByteLevel"' in written, _SPACE in written or "Metaspace" in written
    alphabet = byte_of_character()
    fallback = re.compile("<0x([0-9A-F]{2})>") if model.get("byte_fallback") else None
    prefix, suffix = (
        model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")
    )

    def text(name: str) -> bytes:
        if fallback and (byte := fallback.fullmatch(name)):
            return bytes.fromhex(byte[1])
        name = name.removeprefix(prefix).removesuffix(suffix)
        if byte_level and all(c in alphabet for c in name):
            return bytes(alphabet[c] for c in name)
        return (name.replace(_SPACE, " ") if metaspace else name).encode("utf-8")

    return {i: text(name) for i, name in names.items()}


def _sha256(model: dict[str, Any], merges: list[tuple[str, str]], added: list[Any]) -> str:
    content = [model["vocab"], merges, [[t["id"], t["content"], t["special"]] for t in added]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()
