"""Whether a split is long enough to train on or to measure with."""

from __future__ import annotations

from cllm.core.errors import UserError
from cllm.text.packed import Header
from cllm.text.splits import Splits, segment_bytes


def refuse_hopeless(splits: Splits, corpus_bytes: int, context: int) -> None:
    """Raise ``UserError`` for a split shorter than ``context`` even with one token for each byte,
    before the work is done."""
    for name, table in splits.items():
        if len(table) and segment_bytes(table) + len(table) < context:
            raise _too_short(name, segment_bytes(table), corpus_bytes, 1.0, context)


def refuse_short(name: str, header: Header, corpus_bytes: int, context: int) -> None:
    """Raise ``UserError`` for a packed split without a whole window or without anything to score."""
    if header.tokens - 1 < context:
        per_token = header.text_bytes / (header.tokens - 1)
        raise _too_short(name, header.text_bytes, corpus_bytes, per_token, context)
    if not header.scored_bytes:
        raise UserError(
            f"the loss counts on nothing in {name}: its records have no answers (completion, or "
            "messages of the role assistant)"
        )


def _too_short(name: str, here: int, corpus: int, per_token: float, context: int) -> UserError:
    needed = round(context * per_token)
    whole = round(needed * corpus / max(1, here))
    raise_share = "" if name == "train" else f", or raise data.{name}"
    return UserError(
        f"the corpus is too short: of {corpus:,} bytes {here:,} are for {name}, and one context of "
        f"{context:,} tokens takes about {needed:,} (a corpus of some {whole:,} bytes); give more "
        f"text, lower model.context{raise_share}"
    )
