"""What ``auto`` becomes, given what this machine is said to be able to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cllm.core.config import Config
from cllm.core.errors import UsageError, UserError
from cllm.core.settings import build
from cllm.training import choose as module
from cllm.training.choose import LOGITS_AT_ONCE, MATMUL_CONTEXT, choose, matmul_rates

AUTO = {"model.vocab_size": 4096, "train.device": "cpu", "train.threads": 1}
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes a machine: how much faster bf16 is, what hinders compiling, whether there is a GPU."""

    def make(*, gain: float = 1.0, obstacle: str | None = None, rate: float = 1e11) -> None:
        monkeypatch.setattr(
            module, "matmul_rates", lambda threads: {"fp32": rate, "bf16": rate * gain}
        )
        monkeypatch.setattr(module, "cannot_compile", lambda: obstacle)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    make()
    return make


def chosen(**changes: Any) -> Config:
    """``AUTO`` with dotted keys changed, resolved."""
    return choose(build(AUTO | {k.replace("__", "."): v for k, v in changes.items()})).config


def test_everything_is_resolved_with_a_reason(machine: Machine) -> None:
    choices = choose(build({"model.vocab_size": 4096}))
    keys = ["device", "threads", "dtype", "compile", "attention", "loss_chunk"]
    assert list(choices.reasons) == keys
    for key in keys:
        value = getattr(choices.config.train, key)
        assert value != "auto"
        assert choices.reasons[key].startswith(f"{value}: ")
    assert len(choices.lines()) == len(keys)
    again = choose(choices.config)
    assert (again.config, again.reasons) == (choices.config, {})


def test_openmp_says_how_many_threads(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("cllm.core.cpu.usable_threads", lambda: 3)
    choices = choose(build(AUTO | {"train.threads": "auto"}))
    assert choices.config.train.threads == 1
    assert choose(build(AUTO | {"train.threads": 2})).config.train.threads == 2


@pytest.mark.parametrize(
    ("gain", "dtype"), [(0.2, "fp32"), (1.4, "fp32"), (1.6, "bf16"), (8.0, "bf16")]
)
def test_bf16_where_it_is_faster(gain: float, dtype: str, machine: Machine) -> None:
    machine(gain=gain)
    assert chosen().train.dtype == dtype
    assert chosen(train__dtype="fp16").train.dtype == "fp16"


def test_compiling_where_the_run_is_long_enough(machine: Machine) -> None:
    assert chosen(train__steps=100_000).train.compile == "on"
    assert chosen(train__steps=2).train.compile == "off"
    unknown = choose(build(AUTO | {"train.steps": 2}), seconds=600.0)
    assert unknown.config.train.compile == "on"


def test_compiling_saves_each_worker_its_share_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = module.compile_seconds(build(AUTO))
    gain = module._compile_gain(chosen(train__steps=10_000))
    steps = int(10_000 * costs / gain * 1.5)  # saves half more than it costs, in one process
    assert chosen(train__steps=steps).train.compile == "on"
    assert chosen(train__steps=steps, train__parallel__workers=2).train.compile == "off"


def test_without_a_compiler_it_is_eager_or_refused(machine: Machine) -> None:
    machine(obstacle="there is none")
    choices = choose(build(AUTO | {"train.steps": 100_000}))
    assert choices.config.train.compile == "off"
    assert choices.reasons["compile"] == "off: there is none"
    with pytest.raises(UsageError, match=r"train.compile = 'on', but there is none"):
        chosen(train__compile="on")
    assert chosen(train__compile="off").train.compile == "off"


def test_attention_paths(machine: Machine) -> None:
    compiled = {"train__compile": "on"}
    assert chosen(**compiled).train.attention == "matmul"
    assert chosen(**compiled, model__context=MATMUL_CONTEXT["on"] * 2).train.attention == "sdpa"
    assert chosen(train__compile="off").train.attention == "matmul"
    long = MATMUL_CONTEXT["off"] * 2
    assert chosen(train__compile="off", model__context=long).train.attention == "sdpa"
    for path in ("matmul", "sdpa"):
        assert chosen(**compiled, train__attention=path).train.attention == path


def test_the_head_is_chunked_where_its_logits_are_many(machine: Machine) -> None:
    assert chosen().train.loss_chunk == 0
    many = chosen(train__batch_size=256, model__context=512, train__dtype="fp32")
    chunk = many.train.loss_chunk
    assert isinstance(chunk, int)
    assert 0 < chunk * 4096 * 4 <= LOGITS_AT_ONCE // 4
    assert chosen(train__loss_chunk=7).train.loss_chunk == 7


def test_devices(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(train__device="auto").train.device == "cpu"
    with pytest.raises(UserError, match="finds no such device"):
        chosen(train__device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    found = chosen(train__device="auto", train__steps=1000)
    assert (found.train.device, found.train.dtype, found.train.attention) == (
        "cuda",
        "fp16",
        "sdpa",
    )
    assert found.train.compile == "on"
    with pytest.raises(UserError, match="there are 1 devices"):
        chosen(train__device="cuda:1")


def test_rates_of_a_quiet_machine_are_measured_once_and_threads_put_back(
    isolated: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "own"))
    calls: list[torch.dtype] = []
    monkeypatch.setattr(module, "_matmul_rate", lambda dtype: calls.append(dtype) or 5e9)
    monkeypatch.setattr(module, "is_busy", lambda threads: "others are at work")
    assert matmul_rates(1) == {"fp32": 5e9, "bf16": 5e9}
    assert calls == [torch.float32, torch.bfloat16]
    monkeypatch.setattr(module, "is_busy", lambda threads: None)  # now it is for keeping
    assert matmul_rates(1) == matmul_rates(1) == {"fp32": 5e9, "bf16": 5e9}
    assert calls == [torch.float32, torch.bfloat16] * 2
    before = torch.get_num_threads()
    choose(build(AUTO | {"train.threads": 2}))
    assert torch.get_num_threads() == before
