"""From text to text: stop strings, formats, scores, files that survive a kill."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cllm
from cllm.core.errors import UsageError, UserError
from cllm.infer import jsonl
from cllm.infer.constrain import Format
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.jsonl import answer_file, prompt_of, read_records, score_file
from cllm.infer.sampling import Sampling
from cllm.infer.score import score
from cllm.infer.streaming import TextStream
from cllm.infer.writing import Prompt, write, write_all
from cllm.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def run(trained: Path) -> cllm.Run:
    """A trained run."""
    run = cllm.load(trained)
    assert run.model
    torch.set_num_threads(1)
    return run


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    """A tokenizer of bytes and a few pairs."""
    return Tokenizer.train(["abcab é日 "] * 30, 270)


@given(text=st.text("abcé日 ", max_size=30), stop=st.lists(st.text("abcé", min_size=1, max_size=4)))
def test_a_stream_ends_before_the_first_stop_text_and_never_shows_part_of_one(
    text: str, stop: list[str], letters: Tokenizer
) -> None:
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    wanted = text[: min(ends)[1]] if ends else text
    stream, shown = TextStream(letters, stop), ""
    for token in letters.encode(text):
        shown += stream.feed(int(token))
        assert wanted.startswith(shown)
    assert stream.stopped == any(s in text for s in stop)
    assert shown + stream.end() == wanted


def test_writing_ends_before_a_stop_text(run: cllm.Run) -> None:
    whole = run.generate("The old", max_tokens=40, temperature=0)
    stop = whole[12:15]
    pieces = list(run.stream("The old", Sampling(max_tokens=40, temperature=0, stop=("@@", stop))))
    assert "".join(pieces) == whole[: whole.index(stop)]
    (made,) = run.complete(["The old"], max_tokens=40, temperature=0, stop=(stop,))
    assert (made.text, made.reason) == (whole[: whole.index(stop)], "stop")


def test_many_prompts_are_answered_in_order_as_each_alone(run: cllm.Run) -> None:
    prompts = ["The old", "", "A" * 700, "The quiet child", "x"]
    engine = run.engine(slots=3)
    made = run.complete(prompts, engine=engine, max_tokens=20, seed=4)
    for prompt, completion in zip(prompts, made, strict=True):
        (alone,) = run.complete([prompt], engine=engine, max_tokens=20, seed=4)
        assert completion == alone
    assert [c.unread > 0 for c in made] == [False, False, True, False, False]
    assert made[2].unread == made[2].prompt_tokens - run.config.model.context


@pytest.mark.parametrize("seed", range(3))
def test_output_matches_the_format_that_is_asked_for(seed: int, run: cllm.Run) -> None:
    pytest.importorskip("llguidance")
    pattern = r"(yes|no), [0-9]{2,3} times\."
    made = run.generate("So ", form=Format("regex", pattern), temperature=1.5, seed=seed)
    assert re.fullmatch(pattern, made)
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    form = Format("json", json.dumps(schema))
    body = json.loads(run.generate("So ", form=form, temperature=1.5, seed=seed, max_tokens=400))
    assert set(body) == {"n", "ok"}


def test_formats_that_cannot_be_are_refused(run: cllm.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    for form, part in (
        (Format("regex", "(["), "the regex is not valid"),
        (Format("json", "{"), "the JSON schema is not valid"),
        (Format("json", '{"type": "objct"}'), "the json is not valid"),
    ):
        with pytest.raises(UsageError, match=part) as caught:
            run.generate("x", form=form)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'cllm\[constrain\]'"):
        run.generate("x", form=Format("regex", "a"))


def test_scores_are_sums_of_the_models_log_probabilities(run: cllm.Run) -> None:
    tokenizer, context = run.tokenizer, run.config.model.context
    text = "The old dog sees the narrow garden 12 times. " * 30
    ids = [tokenizer.end_id, *map(int, tokenizer.encode(text))]
    assert len(ids) > 2 * context
    wanted = 0.0
    for begin in range(0, len(ids) - 1, context):
        window = torch.tensor(ids[begin : begin + context + 1])
        with torch.no_grad():
            logprobs = run.model(window[None, :-1])[0].double().log_softmax(-1)
        wanted += float(logprobs.gather(1, window[1:, None]).sum())
    found = run.score(text)
    assert found.logprob == pytest.approx(wanted, rel=1e-5)
    assert found.tokens == len(ids) - 1
    assert found.bytes == len(text.encode())
    assert found.bpb == pytest.approx(-wanted / math.log(2) / len(text.encode()), rel=1e-5)


def test_a_text_after_a_prompt_is_scored_with_all_of_it_before_the_eyes(run: cllm.Run) -> None:
    tokenizer, context = run.tokenizer, run.config.model.context
    prompt, text = "The old dog sees the child. " * 40, " The quiet boat"
    ids = [int(i) for part in (prompt, text) for i in tokenizer.encode(part)]
    count = len(tokenizer.encode(text))
    window = torch.tensor(ids[-context - 1 :])
    with torch.no_grad():
        logits = run.model(window[None, :-1])[0].double()
    logprobs = logits.log_softmax(-1).gather(1, window[1:, None])[-count:]
    found = run.score(text, prompt)
    assert found.logprob == pytest.approx(float(logprobs.sum()), rel=1e-5)
    assert found.tokens == count
    greedy = run.generate(prompt[:100], max_tokens=3, temperature=0)
    assert not found.greedy
    encoded = tokenizer.encode(greedy)
    if tokenizer.decode(encoded) == greedy and len(encoded) == 3:
        assert run.score(greedy, prompt[:100]).greedy
    both = run.score(text, "x").logprob + run.score("x").logprob
    split = score(run.engine(), tokenizer, "x" + text)
    if split.tokens == run.score("x").tokens + count:
        assert split.logprob == pytest.approx(both, rel=1e-5)


PROMPTS = [{"prompt": "The old", "max_tokens": 5 + n % 3, "seed": n} for n in range(7)]


def as_lines(records: list[dict[str, Any]]) -> str:
    """JSONL."""
    return "".join(json.dumps(record) + "\n" for record in records)


def test_a_file_that_was_cut_anywhere_is_gone_on_with(
    run: cllm.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text(as_lines(PROMPTS))
    engine = run.engine(slots=3)
    done = answer_file(engine, run.tokenizer, prompts, out, Sampling(temperature=1.0))
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert (done.total, done.kept, len(lines)) == (7, 0, 7)
    assert [json.loads(line)["index"] for line in lines] == list(range(7))
    for size in (0, 1, len(lines[0]), len(lines[0]) + 9, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:size])
        asked: list[int] = []

        def spied(engine: Engine, tokenizer: Tokenizer, left: Any, asked: list = asked) -> Any:
            asked.append(len(left))
            return write_all(engine, tokenizer, left)

        monkeypatch.setattr(jsonl, "write_all", spied)
        done = answer_file(engine, run.tokenizer, prompts, out, Sampling(temperature=1.0))
        kept = whole[:size].count(b"\n")
        assert (done.kept, asked) == (kept, [7 - kept])
        assert out.read_bytes() == whole


def test_answers_to_something_else_are_not_overwritten(run: cllm.Run, tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text(as_lines(PROMPTS))
    engine = run.engine(slots=3)
    answer_file(engine, run.tokenizer, prompts, out, Sampling(temperature=1.0))
    whole = out.read_bytes()
    with pytest.raises(UsageError, match=r"o.jsonl:1 is no answer to this request"):
        answer_file(engine, run.tokenizer, prompts, out, Sampling(temperature=0.5))
    prompts.write_text(as_lines(PROMPTS[:3]))
    with pytest.raises(UsageError, match=r"o.jsonl:4 is no answer"):
        answer_file(engine, run.tokenizer, prompts, out, Sampling(temperature=1.0))
    assert out.read_bytes() == whole
    out.write_text("my thesis\n")
    with pytest.raises(UsageError, match=r"o.jsonl:1 is no answer"):
        answer_file(engine, run.tokenizer, prompts, out, Sampling(temperature=1.0))
    assert out.read_text() == "my thesis\n"


@pytest.mark.parametrize(
    "body", [b"my thesis", b'{"index": 1, "request": "', b'{"index": 0}', b"\xff"]
)
def test_what_has_no_line_end_is_dropped_only_where_it_is_half_of_our_line(
    body: bytes, run: cllm.Run, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text(as_lines(PROMPTS[:1]))
    out.write_bytes(body)
    with pytest.raises(UsageError, match=r"o.jsonl:1 is no answer"):
        answer_file(run.engine(), run.tokenizer, prompts, out, Sampling())
    assert out.read_bytes() == body
    out.unlink()
    answer_file(run.engine(), run.tokenizer, prompts, out, Sampling())
    whole = out.read_bytes() + body
    out.write_bytes(whole)
    with pytest.raises(UsageError, match=r"o.jsonl:2 is no answer"):
        answer_file(run.engine(), run.tokenizer, prompts, out, Sampling())
    assert out.read_bytes() == whole


def test_answers_do_not_go_into_the_file_of_the_prompts(run: cllm.Run, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    body = '{"prompt": "The old", "text": "dog"}'
    prompts.write_text(body)
    (tmp_path / "link.jsonl").hardlink_to(prompts)
    for out in (prompts, tmp_path / "link.jsonl"):
        with pytest.raises(UsageError, match="is the file that is to be answered"):
            answer_file(run.engine(), run.tokenizer, prompts, out, Sampling())
        with pytest.raises(UsageError, match="is the file that is to be answered"):
            score_file(run.engine(), run.tokenizer, prompts, out)
    assert prompts.read_text() == body


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_file_that_may_not_grow_is_one_line_and_gone_on_with(
    run: cllm.Run, tmp_path: Path
) -> None:
    import resource

    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text(as_lines(PROMPTS))
    engine = run.engine(slots=3)
    answer_file(engine, run.tokenizer, prompts, out, Sampling())
    whole = out.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 7, len(whole) // 2):
        out.unlink(missing_ok=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(UserError, match=r"cannot write .*o.jsonl: .*larger than allowed"):
                answer_file(engine, run.tokenizer, prompts, out, Sampling())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert out.exists() == (size > 0)
        assert size == 0 or whole.startswith(out.read_bytes())
        answer_file(engine, run.tokenizer, prompts, out, Sampling())
        assert out.read_bytes() == whole


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_two_do_not_write_one_file(run: cllm.Run, tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text(as_lines(PROMPTS))
    engine = run.engine(slots=3)
    answer_file(engine, run.tokenizer, prompts, out, Sampling())
    half = out.read_bytes()[:-20]
    out.write_bytes(half)
    with out.open("rb") as file:
        import fcntl

        fcntl.flock(
            file, fcntl.LOCK_EX
        )  # an open file of its own holds it, as another process does
        with pytest.raises(UsageError, match=r"another process is writing .*o.jsonl"):
            answer_file(engine, run.tokenizer, prompts, out, Sampling())
        assert out.read_bytes() == half
    assert answer_file(engine, run.tokenizer, prompts, out, Sampling()).kept == 6


def test_scores_of_a_file_are_those_of_its_texts(run: cllm.Run, tmp_path: Path) -> None:
    texts, out = tmp_path / "t.jsonl", tmp_path / "o.jsonl"
    texts.write_text(
        as_lines([{"text": "The old dog"}, {"prompt": "The old", "completion": " dog", "id": 4}])
    )
    assert score_file(run.engine(), run.tokenizer, texts, out).total == 2
    first, second = map(json.loads, out.read_text().splitlines())
    assert first["logprob"] == run.score("The old dog").logprob
    assert second["bpb"] == run.score(" dog", "The old").bpb
    assert score_file(run.engine(), run.tokenizer, texts, out).kept == 2


WRONG = [
    (b"", "holds no line"),
    (b'{"prompt": "a"}\n\xff\xfe\n', "p.jsonl:2 is not UTF-8"),
    (b'{"prompt": ', "p.jsonl:1 is not JSON"),
    (b"[1]\n", "p.jsonl:1 is a JSON list"),
    (b'{"promt": "a"}', "unknown field 'promt': did you mean 'prompt'"),
    (b'{"prompt": 3}', "'prompt' is a JSON int, not a string"),
    (b'{"prompt": "\\ud800"}', "holds a lone surrogate"),
    (b'{"prompt": "a", "max_tokens": 0}', "max_tokens = 0 must be at least 1"),
    (b'{"prompt": "a", "top_k": 1.5}', "'top_k' must be a whole number"),
    (b'{"prompt": "a", "temperature": "hot"}', "'temperature' must be a number"),
    (b'{"prompt": "a", "stop": [1]}', "'stop' must be a string or a list"),
    (b'{"prompt": "a", "stop": ""}', "stop = "),
    (
        b'{"prompt": "a", "max_token": 5}',
        "p.jsonl:1: unknown field 'max_token': did you mean 'max_t",
    ),
    (b'{"prompt": "a", "temprature": 0}', "did you mean 'temperature'"),
    (b'{"prompt": "a", "topK": 1}', "did you mean 'top_k'"),
    (b'{"prompt": "a", "Max-Tokens": 1}', "did you mean 'max_tokens'"),
    (b'{"prompt": "a", "regex": "a", "json_schema": {}}', "exclude each other"),
]


@pytest.mark.parametrize(("body", "part"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_lines_are_named_before_anything_is_written(
    body: bytes, part: str, run: cllm.Run, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_bytes(body)
    with pytest.raises(UserError, match=part):
        answer_file(run.engine(), run.tokenizer, prompts, out, Sampling())
    assert not out.exists()


def test_what_the_engine_cannot_do_is_told_with_its_line_before_anything_is_written(
    run: cllm.Run, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    lines = [{"prompt": "a"}, {"prompt": "b", "top_k": 0}]
    prompts.write_text(as_lines(lines))
    engine = run.engine(index=True)
    with pytest.raises(UsageError, match=r"p.jsonl:2: an index as output head needs top_k"):
        answer_file(engine, run.tokenizer, prompts, out, Sampling(max_tokens=2))
    prompts.write_text(as_lines([{"prompt": "a"}, {"prompt": "b", "repetition_penalty": 1.1}]))
    with pytest.raises(UsageError, match=r"p.jsonl:2: an index as output head knows no log-prob"):
        answer_file(engine, run.tokenizer, prompts, out, Sampling(max_tokens=2))
    assert not out.exists()
    pytest.importorskip("llguidance")
    for line, part in (
        ({"prompt": "b", "regex": "(["}, "p.jsonl:3: the regex is not valid"),
        ({"prompt": "b", "json_schema": {"type": "objct"}}, "p.jsonl:3: the json is not valid"),
    ):
        prompts.write_text(as_lines([{"prompt": "a"}, {"prompt": "a", "regex": "a"}, line]))
        with pytest.raises(UsageError, match=part):
            answer_file(run.engine(), run.tokenizer, prompts, out, Sampling(max_tokens=2))
        assert not out.exists()


def test_a_record_sets_what_it_names_and_leaves_the_rest() -> None:
    record = {"prompt": "a", "stop": "b", "seed": 3, "logprobs": None, "regex": "x+", "note": 1}
    record |= {"prompt_id": 2, "id": 3, "tokens": 4, "text": "b", "step": 1, "top": 2}
    made = prompt_of(record, "here", Sampling(top_k=9, seed=1, logprobs=2), None)
    assert made.sampling == Sampling(top_k=9, seed=3, stop=("b",))
    assert made.form == Format("regex", "x+")
    json_schema = prompt_of({"prompt": "a", "json_schema": {}}, "here", Sampling(), made.form)
    assert json_schema.form == Format("json", "{}")


def test_missing_files_and_texts_that_cannot_be_scored(run: cllm.Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="an empty text has no likelihood"):
        run.score("")
    with pytest.raises(UserError, match="not valid UTF-8"):
        list(write(Engine(run.model, EngineOptions()), run.tokenizer, Prompt("\udc80")))
