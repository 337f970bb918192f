"""JSONL: one document a line, from a named field, a prompt with its completion, or a chat."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cllm.core.errors import UserError, nearest
from cllm.text.document import Document
from cllm.text.notes import Notes

CHAT_TEMPLATE = "'Role: content' and an empty line for each message, loss on the Assistant's"
PROMPT_TEMPLATE = "prompt and completion joined as they are, loss on the completion"


def json_documents(
    pieces: Iterable[str], name: str, field: str, notes: Notes
) -> Iterator[Document]:
    """Documents of a JSONL text that comes in pieces; empty lines are passed over.

    Raises ``UserError`` naming file and line for what is no JSON object or lacks the text.
    """
    before = len(notes.problems)
    for number, line in enumerate(_lines(pieces), 1):
        if len(notes.problems) > before:  # the pieces ended early, in the middle of this line
            return
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where} is a JSON {type(record).__name__}, not an object {{…}}")
        yield record_document(record, where, field, notes)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines by \\n alone: ``str.splitlines`` would also cut at U+2028, which JSON strings may hold."""
    rest = list[str]()
    for piece in pieces:
        first, *others = piece.split("\n")
        rest.append(first)
        for line in others:
            yield "".join(rest)
            rest = [line]
    yield "".join(rest)


def record_document(record: Mapping[str, Any], where: str, field: str, notes: Notes) -> Document:
    """The document of one record: its ``field``, else prompt/completion, else chat ``messages``.

    Raises ``UserError`` naming ``where`` if it has none of them or they are not strings.
    """
    if field in record:
        return Document(where, _text(record[field], where, field))
    if "prompt" in record and "completion" in record:
        notes.remark(f"prompt/completion records ({PROMPT_TEMPLATE})", where)
        prompt = _text(record["prompt"], where, "prompt")
        completion = _text(record["completion"], where, "completion")
        text = prompt + completion
        return Document(where, text, ((len(prompt), len(text)),))
    if "messages" in record:
        notes.remark(f"chat records ({CHAT_TEMPLATE})", where)
        return _chat(record["messages"], where)
    fields = [str(key) for key in record]
    raise UserError(
        f"{where} has no field {field!r}{nearest(field, fields)}; it has "
        f"{', '.join(map(repr, fields[:8])) or 'none'}: name the text's with data.field"
    )


def _text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {field!r} is a JSON {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {field!r} holds a lone surrogate (half a character)") from error
    return value


def _chat(messages: object, where: str) -> Document:
    """A chat as plain text. The empty line that ends an answer counts: it is how the model learns to
    hand over. Markers are ordinary text, since no text may turn into a special token."""
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{where}: 'messages' must be a list of {{role, content}} objects, not empty"
        )
    text, spans = "", list[tuple[int, int]]()
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{where}: each of 'messages' needs 'role' and 'content'")
        role = _text(message["role"], where, "role")
        text += f"{role.capitalize()}: "
        start = len(text)
        text += _text(message["content"], where, "content") + "\n\n"
        if role == "assistant":
            spans.append((start, len(text)))
    return Document(where, text, tuple(spans))
