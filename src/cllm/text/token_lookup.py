"""Tokens by what a person types, with their codes: what ``cllm tokens`` looks into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cllm.core.errors import UsageError, UserError
from cllm.text.counts import count_tokens
from cllm.text.dataset import packed_path, prepared_key, tokens_key
from cllm.text.merge_tree import MergeTree
from cllm.text.morphology import Morphology, word_key
from cllm.text.packed import PackedTokens
from cllm.text.token_codes import TokenCodes
from cllm.text.token_number import token_number
from cllm.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class TokenLookup:
    """A tokenizer's tokens: their merges, words and codes.

    ``note`` says why there are no counts, or is empty.
    """

    tree: MergeTree
    morphology: Morphology
    codes: TokenCodes
    encode: Callable[[str], list[int]]
    note: str = ""

    @classmethod
    def of_run(cls, tokenizer: Path, data: Path) -> TokenLookup:
        """Of a run's ``tokenizer.json``, counted in the training split of its prepared ``data``.

        Raises:
            UserError: no such tokenizer.
            ValueError: a tokenizer without merges.
        """
        ours = Tokenizer.load(tokenizer)
        tree, counts, note = MergeTree.from_tokenizer(ours), None, ""
        try:
            key = tokens_key(prepared_key(data) or "", ours)
            # The header names data and tokenizer; reading all of it once more would add no safety.
            tokens = PackedTokens.open(packed_path(data, "train"), key=key, verify=False)
            counts = count_tokens(tokens, len(tree))
        except UserError as error:
            note = f"pieces are ranked by the order of the merges, not by frequency: {error}"
        return cls._of(ours, tree, counts, note)

    @classmethod
    def of_tokenizer(cls, ours: Tokenizer) -> TokenLookup:
        """Of a model's tokenizer, without counts. Raises ``ValueError`` for one without merges."""
        note = "pieces are ranked by the order of the merges: the model's file has no counts"
        return cls._of(ours, MergeTree.from_tokenizer(ours), None, note)

    @classmethod
    def _of(
        cls, ours: Tokenizer, tree: MergeTree, counts: np.ndarray | None, note: str
    ) -> TokenLookup:
        words = Morphology.of(tree)
        codes = TokenCodes.build(tree, counts, words)
        return cls(tree, words, codes, lambda text: [int(i) for i in ours.encode(text)], note)

    @classmethod
    def of_file(cls, path: Path) -> TokenLookup:
        """Of any BPE ``tokenizer.json``, without counts.

        Raises:
            ValueError: no such file, not a tokenizer, or one without merges.
        """
        import tokenizers

        tree = MergeTree.from_tokenizer(path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        words = Morphology.of(tree)
        note = "pieces are ranked by the order of the merges: a tokenizer alone has no counts"
        codes = TokenCodes.build(tree, None, words)
        encode = lambda text: list(backend.encode(text, add_special_tokens=False).ids)  # noqa: E731
        return cls(tree, words, codes, encode, note)

    def name(self, token: int) -> str:
        """A token for display: a literal, or the name of a special one."""
        return self.codes.labels[token]

    def exact(self, text: str) -> int | None:
        """The token that is ``text`` or is named so; ``#123`` is token 123; ``None`` if there is none.

        Raises ``UsageError`` for a number that no token has.
        """
        number = token_number(text, len(self.tree))
        if number is not None:
            return number
        if not text:
            return None
        special = {self.tree.names[i]: i for i in self.tree.special}
        wanted = text.encode("utf-8", "replace")
        whole = (i for i, found in enumerate(self.tree.texts) if found == wanted)
        return next(whole, special.get(text))

    def token(self, text: str) -> int:
        """The token for ``text`` as it is, or with a space before it.

        Raises ``UsageError`` saying how the text is split, if it is more than one.
        """
        found = self.exact(text)
        if found is None and text:
            found = self.exact(f" {text}")
        if found is None:
            raise UsageError(f"{self.split(text)}; name one of them, or a token's id as '#123'")
        return found

    def word(self, text: str) -> tuple[int, str]:
        """The token for a word, and a line on it if it is not the word's own, else an empty one.

        With a space before it, as in running text, comes first; then as it is, then another case. Of a
        word that is several tokens, the longest is taken. Raises ``UsageError`` for an empty word.
        """
        by_number = text.startswith("#") and self.exact(text) is not None
        for spelling in (text,) if by_number or not text else (f" {text}", text):
            found = self.exact(spelling)
            if found is not None:
                return found, ""
        same = [i for i, key in enumerate(self.morphology.keys) if key and key == word_key(text)]
        if same:
            spaced = [i for i in same if self.tree.texts[i].startswith(b" ")]
            variant = (spaced or same)[0]
            return variant, f"{text!r} is no token; its variant {self.name(variant)} is"
        parts = self._parts(text)
        longest = max(parts, key=lambda token: len(self.tree.texts[token]))
        return longest, f"{self.split(text)}; shown is the longest, {self.name(longest)}"

    def split(self, text: str) -> str:
        """How ``text`` is cut into tokens, as a sentence."""
        parts = self._parts(text)
        return f"{text!r} is {len(parts)} tokens here: {' '.join(self.name(i) for i in parts)}"

    def _parts(self, text: str) -> list[int]:
        parts = self.encode(text if text.startswith(" ") else f" {text}") if text else []
        if not parts:
            raise UsageError(f"{text!r} holds no token; name a word or a token's id as '#123'")
        return parts

    def relatives(self, token: int) -> list[int]:
        """The other tokens that come from the word or stem that this one comes from."""
        key = self.morphology.keys[token]
        stem = self.morphology.parents.get(key, key)
        found = {*self.morphology.relatives.get(stem, ()), *self.morphology.relatives.get(key, ())}
        return sorted(i for i in found if self.morphology.keys[i] != key)

    def variants(self, token: int) -> list[int]:
        """The other tokens that differ by a leading space or case alone."""
        same = self.morphology.variants.get(self.morphology.keys[token], ())
        return [i for i in same if i != token]
