"""Each wrong input ends in one clear line, exit code 1 or 2, and leaves nothing half-written."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.store.run import RunDirectory

Cllm = Callable[..., Any]
Options = Callable[..., list[str]]


def files_in(path: Path) -> list[str]:
    """All that lies there."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


def assert_refused(result: Any, code: int, *parts: str) -> None:
    """One line that holds ``parts``, and the exit code."""
    assert result.code == code, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("cllm: ")]
    assert len(lines) == 1, result.err
    assert result.err.splitlines()[-1] == lines[0]
    for part in parts:
        assert part in lines[0]
    assert "Traceback" not in result.err
    assert "Traceback" not in result.out


@pytest.fixture
def texts(isolated: Path, corpus: Path) -> Path:
    """The working directory with some files in it, right ones and wrong ones."""
    shutil.copy(corpus, isolated / "good.txt")
    (isolated / "empty.txt").touch()
    (isolated / "blank.txt").write_text(" \n\n \n")
    (isolated / "short.txt").write_text("Only a few words.\n")
    (isolated / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (isolated / "latin.txt").write_bytes("Er grüßt.\n".encode("latin-1") * 900)
    (isolated / "cut.txt.gz").write_bytes(gzip.compress(b"some words\n" * 4000)[:-20])
    (isolated / "no-field.jsonl").write_text('{"other": "words"}\n' * 50)
    (isolated / "no-json.jsonl").write_text('{"text": "words"}\n{"text": \n')
    (isolated / "folder").mkdir()
    (isolated / "folder" / "picture.png").write_bytes(b"\x89PNG\r\n")
    (isolated / "syntax.toml").write_text("[train\nlr = 1\n")
    (isolated / "key.toml").write_text("[train]\nlearning_rat = 1\n")
    (isolated / "near.toml").write_text("[train]\nbatchsize = 1\n")
    (isolated / "value.toml").write_text('[train]\nlr = "high"\n')
    (isolated / "latin.toml").write_bytes("# Gr\xfc\xdfe\n".encode("latin-1"))
    (isolated / "file").write_text("in the way")
    (isolated / "full").mkdir()
    (isolated / "full" / "thesis.txt").write_text("mine")
    return isolated


TRAIN = [
    (["--data", "none.txt"], 1, ["none.txt"]),
    (["--data", "none/*.txt"], 1, ["none/*.txt"]),
    (["--data", "empty.txt"], 1, ["empty"]),
    (["--data", "blank.txt"], 1, []),
    (["--data", "short.txt"], 1, ["the corpus is too short"]),
    (["--data", "binary.txt"], 1, ["binary.txt"]),
    (["--data", "cut.txt.gz"], 1, ["cut.txt.gz"]),
    (["--data", "no-field.jsonl"], 1, ["no-field.jsonl"]),
    (["--data", "no-json.jsonl"], 1, ["no-json.jsonl:2 is not JSON"]),
    (["--data", "folder"], 1, ["folder"]),
    (["--config", "none.toml"], 2, ["there is no configuration file none.toml"]),
    (["--config", "folder"], 1, ["cannot read folder"]),
    (["--config", "syntax.toml"], 2, ["syntax.toml is not valid TOML", "line 1"]),
    (["--config", "latin.toml"], 1, ["cannot read latin.toml"]),
    (["--config", "key.toml"], 2, ["unknown setting 'train.learning_rat'", "cllm config show"]),
    (["--config", "near.toml"], 2, ["'train.batchsize' (did you mean 'train.batch_size'?)"]),
    (["--config", "value.toml"], 2, ["train.lr = 'high'"]),
    (["--set", "train.lrr=1"], 2, ["'train.lrr' (did you mean 'train.lr'?)"]),
    (["--set", "batch_size=1"], 2, ["did you mean 'train.batch_size'?"]),
    (["--set", "train.lr"], 2, ["--set wants key=value, not 'train.lr'"]),
    (["--set", "train.lr=-1"], 2, ["train.lr = -1"]),
    (["--set", "train.lr=inf"], 2, ["train.lr = inf"]),
    (["--set", "train.steps=many"], 2, ["train.steps = 'many'"]),
    (["--set", "train.warmup=99"], 2, ["train.warmup = 99 leaves nothing of train.steps = 12"]),
    (["--set", "model.norm_eps=0"], 2, ["model.norm_eps = 0"]),
    (["--set", "model.n_heads=5"], 2, ["model.d_model = 64 is not a multiple", "n_heads = 5"]),
    (["--set", "model.norm=batchnorm", "--set", "train.batch_size=1"], 2, ["batch_size must be"]),
    (["--set", "model.vocab_size=280"], 2, ["model.vocab_size = 280 is smaller"]),
    (["--set", "tokenizer.file=none.json"], 1, ["none.json"]),
    (["--set", "tokenizer.file=good.txt"], 1, ["good.txt"]),
    (
        ["--set", "tokenizer.vocab_size=257", "--set", "model.embedding.init=crystal"],
        2,
        ["model.embedding.init = 'crystal'", "merge"],
    ),
    (["--set", "model.embedding.own_vectors=false"], 2, ["own_vectors needs pieces", "composed"]),
    (["--set", "model.embedding.lattice_step=0.5"], 2, ["lattice_step is that of a lattice"]),
    (
        [
            *("--set", "model.tie_embeddings=false", "--set", "train.lazy_rows=on"),
            *("--set", "train.optimizer_in_backward=true", "--set", "train.clip=0"),
        ],
        2,
        ["train.optimizer_in_backward: train.lazy_rows = 'on' updates rows at the end"],
    ),
    (["--set", "model.embedding.pieces=100"], 2, ["pieces needs pieces", "composed"]),
    (["--set", "model.embedding.nonzeros=9"], 2, ["nonzeros needs pieces", "composed"]),
    (
        ["--set", "train.loss=sampled", "--set", "train.sampled.share=0.3"],
        2,
        ["train.sampled.share is of candidates by code", "'divisor'"],
    ),
    (
        ["--set", "model.embedding.lattice=z", "--set", "model.embedding.lattice_step=50"],
        2,
        ["model.embedding.lattice_step = 50 is too coarse: all of the embedding begins at 0"],
    ),
    (["--set", "train.sampled.candidates=64"], 2, ["set train.loss = 'sampled', too"]),
    (["--set", "train.similarity.until=0.5"], 2, ["set train.similarity.weight, too"]),
    (
        ["--set", "model.embedding.lattice=e8", "--set", "model.embedding.lattice_step=1e-8"],
        2,
        ["model.embedding.lattice_step = 1e-08 is too fine"],
    ),
    (["--preset", "tinny"], 2, ["unknown preset 'tinny' (did you mean 'tiny'?)", "known: nano"]),
    (["--set", "train.device=tpu"], 2, ["train.device = 'tpu' is none of"]),
    (["--out", "file"], 1, ["file is a file, not a directory"]),
    (["--out", "file/run"], 1, ["file/run"]),
    (["--out", "full"], 1, ["full is not empty (thesis.txt…)"]),
    (["--time", "soon"], 2, ["'soon' is no duration; write 90s, 10m or 1h30m"]),
    (["--time", "0"], 2, ["a duration must be above zero"]),
    (["--from", "none"], 1, ["none"]),
    (["--resume", "none"], 2, ["--resume goes on with a run as it is: leave out --data"]),
]


@pytest.mark.parametrize(("arguments", "code", "parts"), TRAIN, ids=lambda value: str(value)[:50])
def test_train_refuses(
    arguments: list[str], code: int, parts: list[str], texts: Path, cllm: Cllm, options: Options
) -> None:
    before = files_in(texts)
    data = [] if "--data" in arguments else ["--data", "good.txt"]
    preset = [] if "--preset" in arguments else options()
    result = cllm("train", "--quiet", *data, *preset, *arguments)
    assert_refused(result, code, *parts)
    assert files_in(texts) == before


def test_a_file_in_another_encoding_is_reported_with_its_offset(
    texts: Path, cllm: Cllm, options: Options
) -> None:
    result = cllm("train", "--quiet", "--data", "latin.txt", *options())
    assert_refused(result, 1, "latin.txt")
    assert re.search(r"byte|offset", result.err)


def test_an_order_for_a_tokenizer_that_is_given(
    trained: Path, texts: Path, cllm: Cllm, options: Options
) -> None:
    before = files_in(texts)
    changes = {"tokenizer__file": trained / "tokenizer.json", "tokenizer__order": "ulam"}
    result = cllm("train", "-q", "--data", "good.txt", *options(**changes))
    assert_refused(
        result, 2, "tokenizer.order = 'ulam'", "that is given keeps its own: leave it out"
    )
    assert files_in(texts) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
def test_a_device_that_is_not_there(device: str, texts: Path, cllm: Cllm, options: Options) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is an MPS device here")
    before = files_in(texts)
    result = cllm("train", "-q", "--data", "good.txt", *options(train__device=device))
    assert_refused(result, 1, f"train.device = '{device}'", "use train.device=cpu")
    assert files_in(texts) == before


def test_compiling_without_a_compiler(
    texts: Path, cllm: Cllm, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cllm.core.machine import cpp_compiler

    monkeypatch.setenv("PATH", str(texts / "folder"))
    monkeypatch.setenv("CXX", "")
    cpp_compiler.cache_clear()
    try:
        before = files_in(texts)
        result = cllm("train", "-q", "--data", "good.txt", *options(train__compile="on"))
        assert_refused(result, 2, "train.compile = 'on'", "no C++ compiler was found")
        assert files_in(texts) == before
        fallback = cllm(
            "train", "--data", "good.txt", "--out", "run", *options(train__compile="auto")
        )
        assert fallback.code == 0
        assert "compile off: no C++ compiler was found" in fallback.err
    finally:
        cpp_compiler.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="the trial program has GNU's options")
def test_compiling_with_a_compiler_that_makes_nothing(
    texts: Path, cllm: Cllm, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cllm.core import machine

    monkeypatch.setenv("CXX", "true")
    for question in (machine.cpp_compiler, machine._compiler_works):
        question.cache_clear()
    try:
        result = cllm("train", "-q", "--data", "good.txt", *options(train__compile="on"))
        assert_refused(result, 2, "train.compile = 'on'", "failed on a small OpenMP program")
    finally:
        for question in (machine.cpp_compiler, machine._compiler_works):
            question.cache_clear()


def test_an_existing_run_is_not_overwritten(
    texts: Path, cllm: Cllm, options: Options, trained: Path
) -> None:
    shutil.copytree(trained, "run", symlinks=True)
    before = (texts / "run" / "metrics.jsonl").read_bytes()
    result = cllm("train", "-q", "--data", "good.txt", *options(), "--out", "run")
    assert_refused(result, 1, "run is a run already: go on with --resume run")
    assert (texts / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("command", "code", "parts"),
    [
        (["train", "--resume", "none"], 1, ["none does not exist"]),
        (["train", "--resume", "full"], 1, ["full is not a run"]),
        (["train", "--resume", "RUN"], 2, ["has all its 40 steps"]),
        (["train", "--resume", "RUN/checkpoints/step-00000007"], 1, ["no checkpoint of step 7"]),
        (["train", "--from", "RUN", "--set", "model.d_ff=32"], 2, ["model.d_ff is fixed by"]),
        (
            ["train", "--from", "RUN", "--set", "model.embedding.kind=composed"],
            2,
            ["model.embedding.kind is fixed by", "`cllm reduce`"],
        ),
        (["train", "--from", "RUN", "--config", "model.toml"], 2, ["model.d_ff is fixed by"]),
        (["eval", "none"], 1, ["none does not exist"]),
        (["eval", "RUN", "--split", "all"], 2, ["split 'all' is none of train, validation, test"]),
        (["eval", "RUN", "--data", "none.txt"], 1, ["none.txt"]),
        (["eval", "RUN", "--data", "empty.txt"], 1, ["empty"]),
        (["generate", "none"], 1, ["none does not exist"]),
        (["generate", "RUN", "--prompt", "a\udc80b"], 1, ["the prompt is not valid UTF-8"]),
        (["generate", "RUN", "--temperature", "-1"], 2, ["temperature = -1.0 must be 0"]),
        (["generate", "RUN", "--temperature", "nan"], 2, ["temperature = nan"]),
        (["generate", "RUN", "--top-p", "0"], 2, ["top_p = 0.0 must be above 0"]),
        (["generate", "RUN", "--top-p", "1.5"], 2, ["top_p = 1.5"]),
        (["generate", "RUN", "--top-k", "-1"], 2, ["top_k = -1"]),
        (["generate", "RUN", "--max-tokens", "0"], 2, ["max_tokens = 0 must be at least 1"]),
        (["generate", "RUN", "--min-p", "2"], 2, ["min_p = 2.0 must be in 0"]),
        (["generate", "RUN", "--repetition-penalty", "0"], 2, ["repetition_penalty = 0.0"]),
        (["generate", "RUN", "--stop", ""], 2, ["stop = "]),
        (["generate", "RUN", "--weights", "int5"], 2, ["weights 'int5' are none of"]),
        (["generate", "RUN", "--cache", "fp8"], 2, ["cache 'fp8' is none of"]),
        (["generate", "RUN", "--prompts", "p.jsonl"], 2, ["--prompts and --out go together"]),
        (["generate", "RUN", "--prompts", "none.jsonl", "--out", "o"], 1, ["none.jsonl"]),
        (["generate", "RUN", "--slots", "2"], 2, ["--slots are for --prompts"]),
        (["generate", "RUN", "--regex", "a", "--json-schema", "b"], 2, ["exclude each other"]),
        (["generate", "RUN", "--json-schema", "none"], 1, ["cannot read none"]),
        (["score", "RUN", "none.jsonl", "--out", "o.jsonl"], 1, ["none.jsonl"]),
        (
            ["compile", "RUN", "--weights", "int8-dynamic"],
            1,
            ["the decode step cannot be compiled"],
        ),
        (["compile", "none"], 1, ["none does not exist"]),
        (["tokenizer", "inspect", "none.json"], 1, ["none.json"]),
        (["config", "show", "--set", "train.lr=x"], 2, ["train.lr = 'x'"]),
        (["config", "show", "--config", "key.toml"], 2, ["train.learning_rat"]),
        (["info", "--set", "train.device=cuda:x"], 2, ["train.device"]),
        (["runs", "compare", "none", "RUN"], 1, ["none"]),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else str(value),
)
def test_other_commands_refuse(
    command: list[str], code: int, parts: list[str], texts: Path, cllm: Cllm, trained: Path
) -> None:
    (texts / "model.toml").write_text("[model]\nd_ff = 32\n")
    before = files_in(texts), files_in(trained)
    named = [argument.replace("RUN", str(trained)) for argument in command]
    assert_refused(cllm(*named), code, *parts)
    assert (files_in(texts), files_in(trained)) == before


def test_a_wrong_option_or_command_ends_in_2(cllm: Cllm) -> None:
    for arguments in (
        ["train", "--stepps", "3"],
        ["trian"],
        ["eval"],
        ["generate", "r", "--seed", "x"],
    ):
        result = cllm(*arguments)
        assert result.code == 2
        assert "Traceback" not in result.err
        assert re.search("No such|Missing|Invalid", result.err)


def test_a_traceback_is_shown_when_it_is_asked_for(cllm: Cllm) -> None:
    from cllm.core.errors import UserError

    assert cllm("eval", "none").code == 1
    with pytest.raises(UserError, match="none does not exist"):
        cllm("--debug", "eval", "none")


def test_divergence_ends_in_1(texts: Path, cllm: Cllm, options: Options) -> None:
    changed = options(train__lr=1e30, train__max_nonfinite=3, train__steps=30)
    result = cllm("train", "-q", "--data", "good.txt", "--out", "run", *changed)
    assert_refused(result, 1, "3 steps in a row had a", "lower train.lr (now 1e+30)")
    assert RunDirectory.open("run").status().state == "diverged"


def test_weights_that_are_not_finite_at_the_end_end_in_1(
    texts: Path, cllm: Cllm, options: Options
) -> None:
    changed = options(train__lr=1e20, train__max_nonfinite=90, train__steps=6, train__warmup=0)
    reduced = ["--set", "model.embedding.kind=reduced", "--set", "model.embedding.rank=4"]
    result = cllm("train", "-q", "--data", "good.txt", "--out", "run", *changed, *reduced)
    lines = [line for line in result.err.splitlines() if not line.startswith("warning")]
    assert (result.code, len(lines)) == (1, 1)
    assert "training ended with weights that are not finite" in lines[0]
    assert "lower train.lr (now 1e+20)" in lines[0]
    assert RunDirectory.open("run").status().state == "diverged"
    again = cllm("train", "-q", "--resume", "run")
    assert (again.code, "Traceback" in again.err) == (1, False)
    assert "training ended with weights that are not finite" in again.err


limited = pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")


def limit_file_size(size: int) -> Callable[[], None]:
    """A function that has the kernel refuse files above ``size`` bytes, as a full disk would."""
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@limited
def test_a_disk_that_is_full_before_training(
    texts: Path, process: Callable[..., subprocess.Popen[str]], options: Options, tmp_path: Path
) -> None:
    before = files_in(texts)
    environment = os.environ | {"CLLM_CACHE": str(tmp_path / "cache-of-its-own")}
    child = process(
        *["train", "--data", "good.txt", "--out", "run", *options()],
        env=environment,
        preexec_fn=limit_file_size(20_000),
    )
    _, err = child.communicate()
    assert child.returncode == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("cllm: cannot write")
    left = [path for path in files_in(texts) if not path.startswith("cache-of-its-own")]
    assert left == before


@limited
def test_a_disk_that_fills_while_training(
    texts: Path,
    process: Callable[..., subprocess.Popen[str]],
    options: Options,
    tmp_path: Path,
    cllm: Cllm,
) -> None:
    # The packed tokens fit into the limit; optimizer.pt, twice the size of the weights, does not
    # once the limit is lowered at the first step.
    changed = options(train__steps=400, train__checkpoint_every=3, log__tensorboard=True)
    child = process("train", "--data", "good.txt", "--out", "run", *changed)
    import resource
    import time

    while not (texts / "run" / "checkpoints" / "step-00000003" / "state.json").exists():
        assert child.poll() is None
        time.sleep(0.002)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    _, err = child.communicate()
    assert child.returncode == 1
    assert "Traceback" not in err
    assert re.match(r"cllm: cannot write .*(large|full|space)", err.splitlines()[-1]), err
    run = RunDirectory.open(texts / "run")
    assert run.status().state == "interrupted"
    assert not [path for path in files_in(texts) if ".tmp-" in path]
    last = run.steps()[-1]
    again = cllm("train", "-q", "--resume", "run", "--set", f"train.steps={last + 2}")
    assert again.code == 0


def test_a_cache_that_cannot_be_written_is_done_without(
    texts: Path, cllm: Cllm, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLLM_CACHE", str(texts / "file" / "cache"))
    result = cllm("train", "-q", "--data", "good.txt", "--out", "run", *options())
    assert result.code == 0, result.err


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_a_file_whose_name_is_no_text(texts: Path, cllm: Cllm, options: Options) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    shutil.copy("good.txt", name)
    result = cllm("train", "-q", "--data", name, "--out", "run", *options())
    assert_refused(result, 2, r"the name 'caf\udce9.txt' is no valid text", "give the directory")
    assert not (texts / "run").exists()
    (texts / "named").mkdir()
    shutil.move(name, texts / "named" / name)
    assert cllm("train", "-q", "--data", "named", "--out", "run", *options()).code == 0
    assert cllm("train", "-q", "--resume", "run", "--set", "train.steps=13").code == 0
