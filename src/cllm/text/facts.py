"""What ``cllm tokenizer inspect`` tells of a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from cllm.text.tokenizer import Tokenizer

_LONGEST = 10


@dataclass(frozen=True)
class TokenizerFacts:
    """Sizes, and what the tokenizer makes of a text if one is given."""

    vocab_size: int
    merges: int
    special_tokens: dict[str, int]
    sha256: str
    mean_bytes: float
    """Bytes of a token, averaged over the vocabulary without the special ones."""
    longest: tuple[str, ...]
    """The longest tokens, as Python literals."""
    text_bytes: int | None = None
    text_tokens: int | None = None
    bytes_per_token: float | None = None
    used: int | None = None
    """Entries of the vocabulary that the text uses."""
    pieces: tuple[str, ...] | None = None
    """The first tokens of the text, as Python literals."""


def tokenizer_facts(
    tokenizer: Tokenizer, text: str | None = None, shown: int = 40
) -> TokenizerFacts:
    """Facts of a tokenizer; those on ``text`` show its first ``shown`` tokens."""
    specials = tokenizer.special_tokens()
    plain = set(range(tokenizer.vocab_size)) - set(specials.values())
    sizes = {i: len(tokenizer.token_bytes(i)) for i in plain}
    longest = sorted(plain, key=lambda i: (-sizes[i], i))[:_LONGEST]
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "merges": len(tokenizer.merges()),
        "special_tokens": specials,
        "sha256": tokenizer.sha256,
        "mean_bytes": sum(sizes.values()) / len(sizes),
        "longest": tuple(literal(tokenizer.token_bytes(i)) for i in longest),
    }
    if text is not None:
        ids = tokenizer.encode(text)
        size = len(text.encode("utf-8"))
        facts |= {
            "text_bytes": size,
            "text_tokens": len(ids),
            "bytes_per_token": size / max(1, len(ids)),
            "used": len(set(ids.tolist())),
            "pieces": tuple(literal(tokenizer.token_bytes(int(i))) for i in ids[:shown]),
        }
    return TokenizerFacts(**facts)  # type: ignore[arg-type]


def literal(piece: bytes) -> str:
    """Bytes as a person reads them: a string literal where they are text, else a bytes literal."""
    try:
        return repr(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(piece)
