"""``cllm tokenizer`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cllm.cli.tokenizer import app
from cllm.core.errors import UserError
from cllm.text.tokenizer import Tokenizer

RUN = CliRunner()


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("some text of some words\n" * 40, encoding="utf-8")
    out = tmp_path / "new" / "t.json"
    arguments = ["train", str(tmp_path / "a.txt"), "--vocab-size", "270", "--out", str(out)]
    result = RUN.invoke(app, [*arguments, "--special", "<|x|>"], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.startswith(f"{out}: 270 tokens from 960 bytes of text")
    assert [path.name for path in out.parent.iterdir()] == ["t.json"]
    return out


def test_train_and_inspect(trained: Path) -> None:
    assert Tokenizer.load(trained).special_tokens() == {"<|endoftext|>": 0, "<|x|>": 1}
    result = RUN.invoke(app, ["inspect", str(trained), "--text", "some日"], catch_exceptions=False)
    assert "270 tokens, 12 merges" in result.output
    assert "special: <|endoftext|> = 0, <|x|> = 1" in result.output
    assert "text: 7 bytes, 4 tokens, 1.75 bytes per token" in result.output
    assert r"tokens: 'some' b'\xe6' b'\x97' b'\xa5'" in result.output


def test_inspect_json(trained: Path) -> None:
    (trained.parent / "tokenizer.json").write_bytes(trained.read_bytes())
    result = RUN.invoke(app, ["inspect", str(trained.parent), "--json"], catch_exceptions=False)
    facts = json.loads(result.output)
    assert facts["vocab_size"] == 270
    assert facts["text_bytes"] is None


def test_mistakes(tmp_path: Path) -> None:
    missing = ["train", str(tmp_path / "none.txt"), "--out", str(tmp_path / "t.json")]
    with pytest.raises(UserError, match="no file or directory"):
        RUN.invoke(app, missing, catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="vocab_size"):
        RUN.invoke(app, ["train", "--vocab-size", "5"], catch_exceptions=False)
