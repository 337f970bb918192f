"""Files of requests, one JSON object a line, answered into another file line by line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from cllm.core.atomic import clear_errors
from cllm.core.errors import UsageError, UserError, nearest
from cllm.infer.answers import Record, answers, request_key
from cllm.infer.batching import check_for_head
from cllm.infer.constrain import Format, constraint_of
from cllm.infer.engine import Engine
from cllm.infer.sampling import Sampling
from cllm.infer.score import score
from cllm.infer.writing import Prompt, write_all
from cllm.text.tokenizer import Tokenizer

Advance = Callable[[float], None]
"""Told which share of the work was done."""
SAMPLING = tuple(f.name for f in fields(Sampling))
FIELDS = ("prompt", *SAMPLING, "regex", "json_schema")
ALIKE = 0.88
"""Of two names, as difflib measures it: "topk" and "top_k" are 0.89 alike, "top" and "stop" 0.86."""


def read_records(path: Path) -> list[tuple[str, Record]]:
    """(``file:line``, record) of every line that is not empty.

    Raises ``UserError`` for a file that cannot be read or is no UTF-8, and for a line that is no object.
    """
    with clear_errors(path, "read"):
        body = path.read_bytes()
    records = []
    for number, line in enumerate(body.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8; save the file in that encoding") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where} is a JSON {type(record).__name__}, not an object {{…}}")
        records.append((where, record))
    if not records:
        raise UserError(f"{path} holds no line; write one JSON object a line")
    return records


def text_field(record: Record, name: str, where: str) -> str:
    """A string of a record. Raises ``UserError`` if it is missing or no text."""
    if name not in record:
        raise UserError(f"{where} has no field {name!r}{nearest(name, list(record))}")
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} is a JSON {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name!r} holds a lone surrogate (half a character)") from error
    return value


def prompt_of(record: Record, where: str, sampling: Sampling, form: Format | None) -> Prompt:
    """The prompt of a record: its ``prompt``, and of ``Sampling`` what it gives beside it.

    ``regex`` or ``json_schema`` (an object) take the place of ``form``. ``UserError`` names ``where``.
    """
    _refuse_misspelt(record, where)
    if "regex" in record and "json_schema" in record:
        raise UserError(f"{where}: 'regex' and 'json_schema' exclude each other; leave one out")
    given = {name: record[name] for name in SAMPLING if name in record}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    try:
        given = {name: _fitting(name, value) for name, value in given.items()}
        merged = Sampling(**{name: getattr(sampling, name) for name in SAMPLING} | given)
    except (UsageError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
    if "regex" in record:
        form = Format("regex", text_field(record, "regex", where))
    elif "json_schema" in record:
        form = Format("json", json.dumps(record["json_schema"]))
    return Prompt(text_field(record, "prompt", where), merged, form)


def _refuse_misspelt(record: Record, where: str) -> None:
    """Fields of any other name are the user's own; one that nearly is ours was meant."""
    for name in record:
        meant = "" if name in FIELDS else _nearly(name)
        if meant:
            raise UserError(f"{where}: unknown field {name!r}: did you mean {meant!r}?")


@lru_cache  # the same names come on every line
def _nearly(name: str) -> str:
    plain = name.lower().replace("-", "_")
    return next(iter(difflib.get_close_matches(plain, FIELDS, n=1, cutoff=ALIKE)), "")


def _fitting(name: str, value: Any) -> Any:
    """``value`` in the type of the field ``name`` of ``Sampling``."""
    whole = name in ("max_tokens", "top_k", "seed", "logprobs")
    if name == "stop":
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError("'stop' must be a string or a list of strings")
        return tuple(value)
    if value is None and name == "logprobs":
        return None
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{name!r} must be a {'whole ' if whole else ''}number")
    return value


@dataclass(frozen=True)
class Done:
    """How a file was answered."""

    total: int
    kept: int
    """Answers that stood there before."""
    cut: int = 0
    """Prompts of this call that were longer than the context."""


def answer_file(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Path,
    out: Path,
    sampling: Sampling,
    form: Format | None = None,
    advance: Advance = lambda share: None,
) -> Done:
    """Complete every prompt of a JSONL file into another one, in the same order.

    All lines are checked before ``out`` is touched. Raises ``UserError`` as ``read_records``,
    ``prompt_of`` and ``answers`` do, and with the line for what the engine cannot do.
    """
    records = read_records(prompts)
    made = [prompt_of(record, where, sampling, form) for where, record in records]
    _check(engine, tokenizer, [where for where, _ in records], made)
    facts: tuple[str, ...] = (engine.fingerprint(), engine.options.weights, engine.options.cache)
    if engine.head is not None:  # whose seeds draw other texts
        facts += ("index",)
    keys = [request_key(facts, p.text, p.sampling, p.form) for p in made]
    cut = 0
    with answers(out, keys, prompts) as file:
        left = made[file.done :]
        for index, completion in write_all(engine, tokenizer, left):
            place = file.done + index
            body = {"prompt": made[place].text} | completion.to_json(tokenizer)
            file.write(place, body)
            cut += completion.unread > 0
            advance(1 / len(left))
        return Done(len(made), file.done, cut)


def _check(engine: Engine, tokenizer: Tokenizer, places: list[str], prompts: list[Prompt]) -> None:
    """Raises ``UserError`` with the place of the first prompt that could not be begun."""
    known: set[Format] = set()
    for where, prompt in zip(places, prompts, strict=True):
        try:
            if engine.head is not None:
                check_for_head(prompt.sampling, prompt.form is not None)
            if prompt.form is not None and prompt.form not in known:
                constraint_of(prompt.form, tokenizer)
                known.add(prompt.form)
        except UserError as error:
            raise type(error)(f"{where}: {error}") from error


def score_file(
    engine: Engine,
    tokenizer: Tokenizer,
    texts: Path,
    out: Path,
    advance: Advance = lambda share: None,
) -> Done:
    """Score every text of a JSONL file into another one, in the same order.

    Raises ``UserError`` as ``read_records``, ``score`` and ``answers`` do.
    """
    wanted: list[tuple[str, str | None]] = []
    for where, record in read_records(texts):
        conditional = "completion" in record
        text = text_field(record, "completion" if conditional else "text", where)
        if not text:
            raise UserError(
                f"{where}: an empty text has no likelihood; give at least one character"
            )
        wanted.append((text, text_field(record, "prompt", where) if conditional else None))
    facts = (engine.fingerprint(), engine.options.weights)
    keys = [request_key(facts, text, prompt) for text, prompt in wanted]
    with answers(out, keys, texts) as file:
        for place in range(file.done, len(wanted)):
            text, prompt = wanted[place]
            file.write(place, score(engine, tokenizer, text, prompt).to_json())
            advance(1 / (len(wanted) - file.done))
        return Done(len(wanted), file.done)
