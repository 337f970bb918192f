"""JSONL records: text, prompt/completion, chat; anything else names file and line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.core.errors import UserError
from cllm.text.document import Document
from cllm.text.notes import Notes
from cllm.text.records import json_documents


def read(text: str, field: str = "text", piece: int = 1000) -> tuple[list[Document], Notes]:
    notes = Notes()
    pieces = [text[i : i + piece] for i in range(0, len(text), piece)]
    return list(json_documents(pieces, "data.jsonl", field, notes)), notes


@given(st.lists(st.text()), st.integers(1, 9), st.booleans())
def test_texts_in_any_pieces(texts: list[str], piece: int, ascii_only: bool) -> None:
    lines = [json.dumps({"text": t}, ensure_ascii=ascii_only) for t in texts]
    documents, _ = read("\n".join(lines), piece=piece)
    assert [d.text for d in documents] == texts
    assert [d.name for d in documents] == [f"data.jsonl:{i}" for i in range(1, len(texts) + 1)]


def test_empty_lines_count_as_lines() -> None:
    documents, _ = read('\n{"text": "a"}\r\n\n{"text": "b"}\n')
    assert [(d.name, d.text) for d in documents] == [("data.jsonl:2", "a"), ("data.jsonl:4", "b")]


def test_prompt_and_completion() -> None:
    documents, notes = read('{"prompt": "2+2=", "completion": "4"}\n' * 2)
    assert documents[0] == Document("data.jsonl:1", "2+2=4", ((4, 5),))
    (line,) = notes.lines()
    assert line.startswith("prompt/completion records (")
    assert line.endswith("data.jsonl:1 and 1 more")


def test_chat() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao."},
    ]
    (document,), notes = read(json.dumps({"messages": messages}))
    assert document.text == (
        "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello.\n\nUser: Bye\n\nAssistant: Ciao.\n\n"
    )
    answers = [document.text[a:b] for a, b in document.spans or ()]
    assert answers == ["Hello.\n\n", "Ciao.\n\n"]
    assert "loss on the Assistant's" in notes.lines()[0]


def test_named_field_comes_first() -> None:
    documents, _ = read('{"body": "b", "prompt": "p", "completion": "c"}', field="body")
    assert documents == [Document("data.jsonl:1", "b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "is not JSON"),
        ("[1]", "is a JSON list, not an object"),
        ('{"txet": "a"}', r"no field 'text' \(did you mean 'txet'\?\)"),
        ("{}", "it has none"),
        ('{"text": 3}', "'text' is a JSON int, not a string"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"prompt": "a", "completion": null}', "'completion' is a JSON NoneType"),
        ('{"messages": []}', "must be a list"),
        ('{"messages": [{"role": "user"}]}', "needs 'role' and 'content'"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_wrong_lines_are_named(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read('{"text": "fine"}\n' + line)
    assert str(caught.value).startswith("data.jsonl:2")
