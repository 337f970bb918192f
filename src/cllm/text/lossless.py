"""What a ``tokenizer.json`` must be so that every byte survives it, and the bytes of its tokens.

GPT-2's byte alphabet (Radford et al. 2019) gives each of the 256 bytes a visible character: printable
Latin-1 stands for itself, the other 68 bytes, in order, for U+0100 onwards.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from cllm.core.errors import UserError

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Names under which an end token is recognised, the first that is there wins."""


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's byte alphabet, from its characters to the bytes 0–255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in printable)
    return alphabet | {chr(0x100 + i): b for i, b in enumerate(others)}


def _added(description: dict[str, Any]) -> list[dict[str, Any]]:
    return list(description.get("added_tokens") or [])


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The members of a ``Sequence``, or the part alone."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def refuse_lossy(description: dict[str, Any], origin: str) -> None:
    """Raise ``UserError`` naming the first thing in a parsed ``tokenizer.json`` that loses bytes."""
    cause = _loses(description)
    if cause:
        raise UserError(
            f"{origin}: {cause}, so bytes would be lost; give a byte-level BPE tokenizer (as GPT-2's) "
            "or train one with `cllm tokenizer train`"
        )


def _loses(description: dict[str, Any]) -> str | None:
    model = description["model"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not byte-level BPE"
    if model.get("dropout"):
        return "it merges at random (dropout)"
    if description.get("normalizer") is not None:
        return "it normalises the text"
    steps = _steps(description.get("pre_tokenizer"), "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel":
        return "it is not byte-level"
    if any(step.get("add_prefix_space") for step in steps):
        return "it adds a space to the text"
    for step in steps[:-1]:
        if step["type"] not in ("Split", "Digits") or step.get("behavior") == "Removed":
            return f"its pre-tokenizer has the step {step['type']}"
    missing = [b for c, b in byte_of_character().items() if c not in model["vocab"]]
    if missing:
        return f"it has no token for {len(missing)} of the 256 bytes (0x{min(missing):02x} first)"
    if any(token["lstrip"] or token["rstrip"] for token in _added(description)):
        return "an added token strips the space around it"
    return None


def token_table(description: dict[str, Any]) -> tuple[list[bytes], frozenset[int]]:
    """The bytes of each id (none for special tokens and for gaps), and the ids of the special ones."""
    alphabet = byte_of_character()
    names: dict[int, str] = {i: name for name, i in description["model"]["vocab"].items()}
    added = {token["id"]: token for token in _added(description)}
    special = frozenset(i for i, token in added.items() if token["special"])
    table = [b""] * (1 + max([*names, *added]))
    for index, name in names.items():
        if index not in added:
            table[index] = bytes(alphabet[c] for c in name)
    for index, token in added.items():
        table[index] = b"" if token["special"] else token["content"].encode("utf-8")
    return table, special


def end_token(description: dict[str, Any], origin: str) -> int:
    """The id of the end token. Raises ``UserError`` if no special token bears one of its names."""
    special = {t["content"]: int(t["id"]) for t in _added(description) if t["special"]}
    for name in END_TOKENS:
        if name in special:
            return special[name]
    raise UserError(
        f"{origin} has no end token to separate documents; add one of {', '.join(END_TOKENS)} to its "
        "special tokens"
    )
