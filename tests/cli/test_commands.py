"""The commands as a user types them, on one small run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm.core.config import Config, known_keys
from cllm.store.run import RunDirectory

Cllm = Callable[..., Any]

COMMANDS = [
    [],
    ["train"],
    ["eval"],
    ["compress"],
    ["generate"],
    ["score"],
    ["compile"],
    ["info"],
    ["bench"],
    ["config"],
    ["config", "show"],
    ["config", "schema"],
    ["tokenizer"],
    ["tokenizer", "train"],
    ["tokenizer", "inspect"],
    ["tokens"],
    ["tokens", "nearest"],
    ["runs"],
    ["runs", "list"],
    ["runs", "compare"],
    ["runs", "clean"],
    ["tokens"],
    ["tokens", "show"],
    ["tokens", "similar"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command: list[str], cllm: Cllm) -> None:
    result = cllm(*command, "--help")
    assert result.code == 0
    assert "Usage:" in result.out
    assert " ".join(command) in result.out
    assert not result.err


HEAVY = ("torch", "numpy", "tokenizers", "matplotlib", "scipy", "fpylll", "transformers")


@pytest.mark.parametrize(
    "command",
    [["--help"], ["train", "--help"], ["--version"], ["runs", "list"], ["config", "show"]],
    ids=" ".join,
)
def test_what_needs_no_torch_imports_none(command: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nsys.argv = ['cllm', *sys.argv[1:]]\n"
        "from cllm.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, *command],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert child.stdout
    assert child.stderr == "[]\n"


def test_the_package_imports_no_torch_and_offers_what_it_says() -> None:
    code = (
        "import sys, cllm\nassert 'torch' not in sys.modules\n"
        "assert cllm.UserError.__name__ == 'UserError'\nassert 'torch' not in sys.modules\n"
        "assert all(getattr(cllm, name) for name in cllm.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_completion_is_printed() -> None:
    command = Path(sys.executable).with_name("cllm")
    if not command.exists():
        pytest.skip("the command is not installed beside this Python")
    environment = os.environ | {"_CLLM_COMPLETE": "source_bash"}
    child = subprocess.run([command], env=environment, capture_output=True, text=True)
    assert "complete" in child.stdout
    assert "cllm" in child.stdout


def test_version(cllm: Cllm) -> None:
    from cllm import __version__

    assert cllm("--version").out == f"cllm {__version__}\n"


def test_config_show_has_every_setting_with_its_meaning(cllm: Cllm) -> None:
    out = cllm("config", "show", "--set", "train.lr=0.5", "--set", "model.preset=small").out
    for key in known_keys():
        assert key in out
    assert re.search(r"train\.lr\s+0\.5", out)
    assert re.search(r"model\.d_model\s+384", out)


def test_config_show_prints_a_file_to_start_from(cllm: Cllm, isolated: Path) -> None:
    out = cllm("config", "show", "--toml", "--set", "model.preset=nano").out
    assert tomllib.loads(out)["model"]["d_model"] == 64
    (isolated / "mine.toml").write_text(out)
    again = cllm("config", "show", "--toml", "--config", "mine.toml", "--set", "train.lr=1e-4").out
    assert again == out.replace("lr = 0.003\n", "lr = 0.0001\n")


def test_config_schema_describes_the_configuration(cllm: Cllm) -> None:
    schema = json.loads(cllm("config", "schema").out)
    assert set(schema["properties"]) == set(Config.model_fields)
    train = schema["$defs"]["TrainConfig"]["properties"]
    assert train["lr"]["description"] == "Peak learning rate."
    assert schema["additionalProperties"] is False


def test_info(cllm: Cllm) -> None:
    shown = cllm("info", "--set", "train.threads=1")
    assert shown.code == 0
    for name in ("cores", "cpu quota", "instruction sets", "torch", "train.dtype", "train.compile"):
        assert name in shown.out
    facts = json.loads(cllm("info", "--json", "--set", "train.threads=1").out)
    assert facts["cache"]
    assert re.match("(fp32|bf16|fp16): .+", facts["train.dtype"])
    assert re.match("(sdpa|matmul): .+", facts["train.attention"])
    assert "train.threads" not in facts, "what was given is no choice"


def test_eval_of_splits_and_other_text(
    cllm: Cllm, trained: Path, isolated: Path, text_of: Callable[..., str]
) -> None:
    shown = cllm("eval", trained)
    assert re.match(r"validation: \d\.\d{4} bits per byte \(loss ", shown.out)
    assert "evaluating" in shown.err
    quiet = cllm("eval", trained, "--quiet")
    assert (quiet.out, quiet.err) == (shown.out, "")
    facts = RunDirectory.open(trained).status().facts
    for split in ("validation", "test"):
        result = json.loads(cllm("eval", trained, "-q", "--json", "--split", split).out)
        assert result["bpb"] == pytest.approx(facts[f"{split}_bpb"], rel=1e-6)
        assert set(result) == {"loss", "bpb", "perplexity", "tokens", "bytes"}
    (isolated / "like.txt").write_text(text_of(20, seed=5))
    (isolated / "unlike.txt").write_text("ZQX! 17; " * 200)
    like, unlike = (
        json.loads(cllm("eval", trained, "-q", "--json", "--data", name).out)
        for name in ("like.txt", "unlike.txt")
    )
    assert like["bytes"] == (isolated / "like.txt").stat().st_size
    assert like["bpb"] < 3 < unlike["bpb"]
    early = cllm("eval", trained / "checkpoints" / "best", "-q").out
    assert early == quiet.out


def test_generate_is_a_function_of_the_seed(cllm: Cllm, trained: Path) -> None:
    def text(*options: object) -> str:
        result = cllm("generate", trained, "--prompt", "The quiet", "--max-tokens", 30, *options)
        assert (result.code, result.err) == (0, "")
        return str(result.out)

    assert text("--seed", 3) == text("--seed", 3)
    assert text("--seed", 3) != text("--seed", 4)
    assert text().startswith("The quiet")
    greedy = text("--temperature", 0)
    assert greedy == text("--temperature", 0, "--seed", 9)
    assert greedy == text("--top-k", 1, "--seed", 5)
    assert greedy == text("--top-p", 1e-9, "--seed", 6)


@pytest.mark.parametrize(
    "prompt", ["", " ", "\n", "日本語 🦊", "<|endoftext|>", "é" * 300, "\x01\x7f"]
)
def test_generate_goes_on_from_any_text(prompt: str, cllm: Cllm, trained: Path) -> None:
    result = cllm("generate", trained, "--prompt", prompt, "--max-tokens", 5)
    assert result.code == 0
    assert result.out.startswith(prompt)
    if len(prompt) < 100:
        assert result.err == ""
    else:
        assert re.fullmatch(
            r"the prompt has \d+ tokens and the model's context 64: its last 64 are read\n",
            result.err,
        )


def test_a_file_of_prompts_is_answered_and_gone_on_with(
    cllm: Cllm, trained: Path, isolated: Path
) -> None:
    (isolated / "p.jsonl").write_text(
        '{"prompt": "The old", "seed": 3}\n\n{"prompt": "The quiet", "max_tokens": 4}\n'
    )
    arguments = ["--prompts", "p.jsonl", "--out", "o.jsonl", "--max-tokens", 6, "--slots", 2]
    first = cllm("generate", trained, *arguments)
    assert (first.code, first.out) == (0, "")
    assert first.err.splitlines()[-1] == "o.jsonl: 2 answers"
    made = [json.loads(line) for line in (isolated / "o.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in made] == ["The old", "The quiet"]
    assert [answer["tokens"] for answer in made] == [6, 4]
    again = cllm("generate", trained, *arguments)
    assert again.err.splitlines()[-1] == "o.jsonl: 2 answers, 2 of them kept from before"
    quiet = cllm("score", trained, "s.jsonl", "--out", "scores.jsonl", "--quiet")
    assert quiet.code == 1
    (isolated / "s.jsonl").write_text('{"text": "The old dog"}\n')
    quiet = cllm("score", trained, "s.jsonl", "--out", "scores.jsonl", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    scored = json.loads((isolated / "scores.jsonl").read_text())
    assert scored["bytes"] == len("The old dog")
    assert scored["bpb"] > 0


def test_train_tells_its_results_and_quiet_nothing_else(
    cllm: Cllm, corpus: Path, options: Callable[..., list[str]]
) -> None:
    arguments = ["train", "--data", corpus, *options()]
    loud, quiet = cllm(*arguments, "--out", "loud"), cllm(*arguments, "--out", "quiet", "--quiet")
    assert (loud.code, quiet.code, quiet.err) == (0, 0, "")
    lines = quiet.out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["validation", "test", "run", "report"]
    for line in lines[:2]:
        assert line in loud.out
        assert re.search(r": \d\.\d{4} bits per byte", line)
    for part in ("tokenizer: 300 tokens", "step 6: validation", "step 12/12", "loss_chunk 0:"):
        assert part in loud.err
    run = RunDirectory.open("loud")
    assert run.report.is_file()
    assert run.status().facts["command"].startswith("cllm train --data ")
    assert {path.suffix for path in run.plots.iterdir()} == {".png"}


def test_runs_are_numbered_below_runs(
    cllm: Cllm, corpus: Path, options: Callable[..., list[str]]
) -> None:
    for _ in range(2):
        assert cllm("train", "-q", "--data", corpus, *options(train__steps=1)).code == 0
    names = sorted(path.name for path in Path("runs").iterdir())
    assert [name[-9:] for name in names] == ["-corpus-1", "-corpus-2"]
    listed = json.loads(cllm("runs", "list", "--json").out)
    assert [row["state"] for row in listed] == ["finished", "finished"]


def test_settings_of_file_preset_and_options_in_their_order(
    cllm: Cllm, corpus: Path, isolated: Path, options: Callable[..., list[str]]
) -> None:
    (isolated / "mine.toml").write_text(
        f"[data]\npaths = ['{corpus.as_posix()}']\n[train]\nlr = 0.5\nbatch_size = 2\n"
        "[model]\nn_layers = 1\n"
    )
    few = options(train__steps=1, train__batch_size=3)
    result = cllm("train", "-q", "--config", "mine.toml", "--preset", "nano", "--out", "run", *few)
    assert result.code == 0, result.err
    made = tomllib.loads(Path("run/run.toml").read_text(encoding="utf-8"))
    assert (made["train"]["lr"], made["train"]["batch_size"]) == (0.5, 3)
    assert (made["model"]["n_layers"], made["model"]["d_model"]) == (1, 64)
    assert made["model"]["vocab_size"] == 300


def test_a_time_budget_decides_the_steps(
    cllm: Cllm, corpus: Path, options: Callable[..., list[str]]
) -> None:
    result = cllm("train", "--data", corpus, "--time", "1s", "--out", "run", *options())
    assert result.code == 0, result.err
    made = tomllib.loads(Path("run/run.toml").read_text(encoding="utf-8"))
    steps = made["train"]["steps"]
    assert steps >= 20
    assert RunDirectory.open("run").status().facts["step"] == steps
    assert f"{steps:,} steps of " in result.err


def test_fine_tuning_by_the_command_line(
    cllm: Cllm, trained: Path, isolated: Path, text_of: Callable[..., str], options: Any
) -> None:
    (isolated / "new.txt").write_text(text_of(100, seed=9))
    settings = [o for o in options(train__steps=3) if o not in ("--set", "model.preset=nano")]
    sets = [part for setting in settings for part in ("--set", setting)]
    drop = ["--set", "model.residual_dropout=0.1"]
    result = cllm("train", "--data", "new.txt", "--from", trained, "--out", "fine", *sets, *drop)
    assert result.code == 0, result.err
    run = RunDirectory.open("fine")
    assert run.tokenizer.read_bytes() == RunDirectory.open(trained).tokenizer.read_bytes()
    made, parent = run.read_config()["model"], RunDirectory.open(trained).read_config()["model"]
    assert made == parent | {"residual_dropout": 0.1} or made == {
        k: v for k, v in (parent | {"residual_dropout": 0.1}).items() if k != "preset"
    }
