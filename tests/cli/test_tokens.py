"""``cllm tokens`` as a user types it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cllm as package

Cllm = Callable[..., Any]


def test_show_factors_a_token(cllm: Cllm, trained: Path) -> None:
    shown = cllm("tokens", "show", trained, " the")
    assert shown.code == 0
    assert not shown.err
    for word in ("token", "' the'", "bytes", "20 74 68 65", "count", "code", "root", "variants"):
        assert word in shown.out
    assert "└──" in shown.out
    facts = json.loads(cllm("tokens", "show", trained, "the", "--json").out)
    assert facts["text"] == " the", "where there is no token without a space"
    assert f"#{facts['id']}" in shown.out
    assert math.prod(f["prime"] ** f["exponent"] for f in facts["factors"]).bit_length() == (
        int(facts["bits"]) + 1
    )
    assert facts["count"] > 100
    run = package.load(trained)
    assert run.tokenizer.token_bytes(facts["id"]) == b" the"
    again = json.loads(cllm("tokens", "show", trained, f"#{facts['id']}", "--json").out)
    assert again == facts
    names = [part["text"] for part in facts["merged_from"]]
    assert "".join(names) == " the"


def test_show_special_and_byte_tokens(cllm: Cllm, trained: Path) -> None:
    special = json.loads(cllm("tokens", "show", trained, "<|endoftext|>", "--json").out)
    assert (special["id"], special["bytes"], len(special["factors"])) == (0, "", 1)
    assert special["merged_from"] == []
    high = next(i for i in range(300) if package.load(trained).tokenizer.token_bytes(i) == b"\xff")
    shown = cllm("tokens", "show", trained, f"#{high}")
    assert r"b'\xff'" in shown.out
    assert json.loads(cllm("tokens", "show", trained, f"#{high}", "--json").out)["text"] is None


def test_similar_lists_both_kinds(cllm: Cllm, trained: Path) -> None:
    shown = cllm("tokens", "similar", trained, "the", "-k", 5)
    assert shown.code == 0
    assert shown.out.startswith("' the'")
    for title in ("by code", "similarity", "shared root", "by embedding", "cosine"):
        assert title in shown.out
    found = json.loads(cllm("tokens", "similar", trained, "the", "-k", 5, "--json").out)
    assert found["text"] == " the"
    assert found["note"] == ""
    ours = found["by_codes"]
    assert 0 < len(ours) <= 5
    assert [o["similarity"] for o in ours] == sorted((o["similarity"] for o in ours), reverse=True)
    assert ours[0]["root"]
    run = package.load(trained)
    table = run.model.embedding.table().detach()
    wanted = table @ table[found["id"]] / table.norm(dim=1) / table[found["id"]].norm()
    theirs = found["by_embedding"]
    assert len(theirs) == 5
    for other in theirs:
        assert other["cosine"] == pytest.approx(float(wanted[other["id"]]), abs=1e-5)
    assert found["id"] not in [other["id"] for other in theirs]


def test_words_of_several_tokens_say_so(cllm: Cllm, trained: Path) -> None:
    shown = cllm("tokens", "similar", trained, "thewindow")
    assert shown.code == 0
    assert "'thewindow' is" in shown.err
    assert "shown is the longest" in shown.err
    refused = cllm("tokens", "show", trained, "thewindow")
    assert refused.code == 2
    assert "tokens here:" in refused.err
    assert "#123" in refused.err
    other_case = cllm("tokens", "similar", trained, "THE")
    assert "its variant" in other_case.err
    assert other_case.out.splitlines()[0].lower().startswith("' the'")


def test_any_tokenizer_file_will_do(cllm: Cllm, trained: Path, isolated: Path) -> None:
    shown = cllm("tokens", "show", trained / "tokenizer.json", "the")
    assert shown.code == 0
    assert "count" not in shown.out
    assert "order of the merges" in shown.err
    found = json.loads(cllm("tokens", "similar", trained / "tokenizer.json", "the", "--json").out)
    assert found["by_embedding"] is None
    assert found["by_codes"]


def test_a_compressed_model_has_codes_and_neighbours(
    cllm: Cllm, trained: Path, isolated: Path
) -> None:
    made = cllm("compress", trained, "--method", "fp16", "--quiet", "--out", "small.cllm")
    assert made.code == 0, made.err
    shown = cllm("tokens", "show", "small.cllm", "the")
    assert shown.code == 0, shown.err
    assert "the model's file has no counts" in shown.err
    ours = json.loads(cllm("tokens", "similar", "small.cllm", "the", "--json").out)
    theirs = json.loads(cllm("tokens", "similar", trained, "the", "--json").out)
    assert [near["id"] for near in ours["by_embedding"]][:3] == [
        near["id"] for near in theirs["by_embedding"]
    ][:3]


def test_a_run_without_its_data_or_checkpoints_still_has_codes(
    cllm: Cllm, trained: Path, isolated: Path
) -> None:
    run = isolated / "copy"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "data")
    shutil.rmtree(run / "checkpoints")
    shown = cllm("tokens", "similar", run, "the")
    assert shown.code == 0
    assert "order of the merges" in shown.err
    assert "no learned embedding" in shown.err
    assert "by code" in shown.out
    assert "cosine" not in shown.out


def test_mistakes_are_one_line(cllm: Cllm, trained: Path, isolated: Path) -> None:
    bad = isolated / "unigram.json"
    bad.write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0], ["b", -1]]}}))
    for arguments, code, message in (
        (("show", trained, "#300"), 2, "there is no token #300"),
        (("show", trained, ""), 2, "holds no token"),
        (("similar", trained, ""), 2, "holds no token"),
        (("similar", trained, "the", "-k", "0"), 2, "-k"),
        (("show", isolated / "nothing", "a"), 1, "does not exist"),
        (("show", bad, "a"), 1, "no merge list"),
    ):
        ended = cllm("tokens", *arguments)
        assert ended.code == code, arguments
        assert message in ended.err
        assert not ended.out
