"""Strategies keep to their formulas, refuse by name what cannot be, and the best can be."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.core.config import Config
from cllm.core.errors import UserError
from cllm.core.settings import load_config
from cllm.core.torchrun import Launch
from cllm.training.distributed.check import check_team
from cllm.training.plan import forecast
from cllm.training.plan.calibrate import Constants
from cllm.training.plan.estimate import share_of
from cllm.training.plan.machines import Devices, MachineEntry, read_machines
from cllm.training.plan.pipelines import _pipelines, pipelined, staged
from cllm.training.plan.roofline import Rates
from cllm.training.plan.strategies import (
    first_worker_bytes,
    one_process,
    replicated,
    sharded,
    workers,
)
from cllm.training.plan.work import with_rows, work_of

ConfigOf = Callable[..., Config]
DevicesWith = Callable[..., Devices]
ENTRY: dict[str, Any] = {
    "name": "card",
    "count": 8,
    "tflops": {"bf16": 100.0, "fp32": 10.0},
    "efficiency": 0.5,
    "memory_gb": 1.0,
    "memory_gb_s": 1000.0,
    "link_gb_s": 10.0,
    "latency_us": 5.0,
}


def test_replicas_sum_gradients_in_a_ring(resolved: ConfigOf, devices_with: DevicesWith) -> None:
    config = resolved(train__accumulate=4)
    alone, eight = replicated(config, devices_with(1)), replicated(config, devices_with(8))
    assert alone.communication == alone.sent == 0
    ring = 2 * 7 / 8 * alone.memory.weights
    windows = 7 / 8 * 16 * alone.tokens  # ids and targets of 64 bits, from the first
    assert eight.sent == pytest.approx(ring + windows, rel=0.01)
    few = 2e-6 + 3e-6  # order and windows, and the loss summed in three doublings
    assert eight.communication == pytest.approx((ring + windows) / 1e9 + 14e-6 + few, rel=1e-3)
    assert eight.compute < alone.compute
    assert eight.tokens == alone.tokens == 16 * 64
    assert eight.memory.weights == alone.memory.weights


@pytest.mark.parametrize("tied", [True, False])
def test_stages_send_vectors_and_a_tied_table(
    tied: bool, resolved: ConfigOf, devices_with: DevicesWith
) -> None:
    config = resolved(
        train__accumulate=4, model__n_layers=4, model__tie_embeddings=tied, train__batch_size=2
    )
    two, four = (staged(config, devices_with(count), 2) for count in (2, 4))
    vectors = 4 * two.tokens * config.model.d_model
    table = 4 * 300 * config.model.d_model if tied else 0
    windows = 16 * two.tokens  # all of them to each
    assert two.sent == pytest.approx(vectors + table + windows, rel=0.01)
    assert four.sent == pytest.approx(2 * vectors + table + 3 * windows, rel=0.01)
    assert four.communication > two.communication


def test_shards_hold_less_and_send_more(resolved: ConfigOf, devices_with: DevicesWith) -> None:
    config = resolved(train__accumulate=4, model__n_layers=8)
    whole, parts = (f(config, devices_with(8)) for f in (replicated, sharded))
    assert parts.memory.optimizer == pytest.approx(whole.memory.optimizer / 8)
    assert parts.memory.total < whole.memory.total
    low = config.replace(**{"train.dtype": "bf16"})
    weights = whole.memory.weights
    layers = weights - 4 * 64 * (300 + 1)  # all but the table and the last norm
    for one, width in ((parts, 4), (sharded(low, devices_with(8)), 2)):
        # Layers are gathered twice, the table once; gradients are scattered.
        numbers = 7 / 8 * ((weights + layers) * width / 4 + weights)
        assert one.sent == pytest.approx(numbers + 7 / 8 * 16 * whole.tokens, rel=0.01)


def test_shards_are_copied_out_of_buffers_and_into_them(
    resolved: ConfigOf, devices_with: DevicesWith
) -> None:
    config, devices = resolved(train__accumulate=4, model__n_layers=8), devices_with(8)
    rows, micros = share_of(config, 8)
    work = work_of(with_rows(config, rows), devices.rates)
    own = micros * work.micro.of(8) + work.end.of(8) / 8
    # Read and written: layers for forward and for backward, the rest once, and all gradients.
    numbers = 2 * 8 * work.parameters.layer + work.parameters.fixed + work.parameters.of(8)
    copying = micros * 2 * 4 * numbers / 1e11
    assert copying > 0.1 * work.end.of(8)
    assert sharded(config, devices).compute == pytest.approx(own + copying, rel=1e-9)


def test_a_pipeline_waits_for_its_stages(resolved: ConfigOf, devices_with: DevicesWith) -> None:
    config = resolved(model__n_layers=4, train__batch_size=1, train__accumulate=12)
    devices = devices_with(4, latency=0.0, link=1e15)
    (four,) = [p for p in _pipelines(config, devices) if p.strategy == "pipeline of 4"]
    stage = four.waiting / 3
    assert four.compute == pytest.approx(12 * stage, rel=0.2)  # and the optimizer
    assert four.compute > 12 * stage
    whole = replicated(config, devices_with(1))
    assert four.memory.optimizer < whole.memory.optimizer
    best = pipelined(config, devices)
    assert best.tokens_per_second >= four.tokens_per_second
    assert "no equal stages" in pipelined(config, devices_with(5)).obstacle


@settings(max_examples=8)
@given(st.sampled_from([2, 4, 8, 16, 64]), st.floats(1e8, 1e12), st.floats(0, 1e-3))
def test_a_faster_link_is_never_slower(
    resolved: ConfigOf, devices_with: DevicesWith, count: int, link: float, latency: float
) -> None:
    config = resolved(train__accumulate=16, model__n_layers=8)
    for strategy in (replicated, sharded, pipelined):
        slow = strategy(config, devices_with(count, link=link, latency=latency))
        fast = strategy(config, devices_with(count, link=2 * link, latency=latency / 2))
        assert fast.seconds <= slow.seconds * (1 + 1e-9)
        assert not math.isnan(slow.seconds)


def test_what_cannot_be_is_named(resolved: ConfigOf, devices_with: DevicesWith) -> None:
    for strategy in (replicated, sharded):
        odd = strategy(resolved(), devices_with(3))
        assert "train.batch_size × train.accumulate) do not divide among 3" in odd.obstacle
        assert odd.tokens_per_second == 0
    small = replicated(resolved(), devices_with(1, memory=1e6))
    assert small.obstacle.startswith("does not fit: ")
    many = replicated(resolved(train__batch_size=64), devices_with(1, memory=1e7))
    assert many.obstacle.endswith("halve train.batch_size and double train.accumulate")


def test_workers_share_windows_and_weights(resolved: ConfigOf) -> None:
    rates = Rates(flops=1e10, stream=[(1.0, 1e11)], products={})
    known = Constants(rates=rates, base_memory=10**8, hand_over=1e-5)
    alone = one_process(resolved(), known, None)
    two = workers(resolved(train__parallel__workers=2), known, None)
    assert two.compute < 0.7 * alone.compute
    assert two.communication >= 1e-5
    assert two.memory.weights == alone.memory.weights
    assert two.memory.base == 2 * alone.memory.base
    assert two.memory.total < 2 * alone.memory.total
    first = first_worker_bytes(resolved(train__parallel__workers=2), known)
    assert alone.memory.weights < first < two.memory.total
    assert one_process(resolved(), known, 1e8).obstacle.startswith("does not fit")
    crowded = Rates(flops=5e9, stream=[(1.0, 1e9)], products={})
    both = dataclasses.replace(known, rates=crowded)
    slower = workers(resolved(train__parallel__workers=2), both, None)
    assert slower.compute > 1.5 * two.compute
    assert slower.communication > two.communication


def machine_list(**changes: Any) -> list[MachineEntry]:
    """A list of one entry, changed."""
    return [MachineEntry.model_validate(ENTRY | changes)]


def test_the_best_is_possible_and_its_command_runs_it(config_of: ConfigOf) -> None:
    config = config_of(model__vocab_size=300, train__batch_size=8, train__dtype="auto")
    plan = forecast.plan_on(config, machine_list(), [1, 8], 10**6)
    assert plan.config.train.dtype == "bf16"
    assert plan.best is not None
    assert plan.best.tokens_per_second == max(e.tokens_per_second for e in plan.estimates)
    kinds = {e.strategy: plan.command(e, ["--set", "train.lr=1e-3"]) for e in plan.estimates}
    assert kinds["one device"] == "cllm train --set train.lr=1e-3"
    assert kinds["DDP"] == (
        "torchrun --nproc-per-node=8 -m cllm train --set train.lr=1e-3 --set "
        "train.parallel.strategy=ddp"
    )
    two = forecast.plan_on(config, machine_list(per_machine=4), [8], None)
    (ddp,) = [e for e in two.estimates if e.kind == "ddp"]
    assert two.command(ddp).startswith("torchrun --nnodes=2 --rdzv-backend=c10d ")
    (pipeline,) = [e for e in plan.estimates if e.kind == "pipeline"]
    assert plan.command(pipeline) == ""  # of two, four times side by side
    hours = plan.hours(plan.best)
    assert hours is not None
    assert hours * 3600 * plan.best.tokens_per_second == pytest.approx(10**6)
    json.dumps(plan.to_json())
    tight = forecast.plan_on(config, machine_list(memory_gb=0.001), [8], None)
    assert tight.best is None


@pytest.mark.parametrize("accumulate", [128, 12])
def test_training_does_not_refuse_what_is_recommended(accumulate: int) -> None:
    examples = Path(__file__).parents[3] / "examples"
    settings = [f"train.accumulate={accumulate}"]
    config = load_config(examples / "billion.toml", settings)
    plan = forecast.plan_on(
        config, read_machines(examples / "machines.json"), [2, 8, 32, 512, 1024], None
    )
    commands = {(e.devices, e.strategy): plan.command(e) for e in plan.estimates if not e.obstacle}
    torchruns = {key: c for key, c in commands.items() if c.startswith("torchrun ")}
    assert {devices for devices, _ in torchruns} >= {2, 8, 32}
    assert any("train.pipeline.mode=stages" in command for command in torchruns.values())
    for (devices, _), command in torchruns.items():
        words = shlex.split(command)
        asked = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
        launch = Launch(rank=0, size=devices, local_rank=0, local_size=devices, job="a")
        check_team(choose_there(load_config(examples / "billion.toml", settings + asked)), launch)


def choose_there(config: Config) -> Config:
    """``config`` on a machine with accelerators, as far as the check of a team reads it."""
    return config.replace(**{"train.dtype": "bf16", "train.compile": "off"})


@pytest.mark.parametrize(
    "changes",
    [
        {"train__loss": "sampled", "train__sampled__candidates": 8},
        {"train__similarity__weight": 0.1},
        {"model__embedding__kind": "composed"},
        {"model__embedding__lattice": "z"},
    ],
)
def test_what_the_model_of_a_step_does_not_cover_is_refused(
    changes: dict[str, Any], config_of: ConfigOf
) -> None:
    with pytest.raises(UserError, match=r"^(train|model)\.\S+.* is not covered by the plan"):
        forecast.plan_on(config_of(model__vocab_size=300, **changes), machine_list(), [], None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a list of machines"),
        (json.dumps([ENTRY | {"count": 0}]), "machine 1: count: "),
        (json.dumps([ENTRY, ENTRY | {"speed": 1}]), "machine 2: speed: extra"),
        (json.dumps([ENTRY | {"tflops": {}, "efficiency": 2}]), "machine 1: efficiency: "),
    ],
)
def test_a_wrong_list_is_refused_in_one_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(UserError, match=why) as caught:
        read_machines(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_slowest_device_of_a_list_decides(config_of: ConfigOf) -> None:
    entries = machine_list() + machine_list(name="old", tflops={"fp32": 1.0}, count=2)
    config = config_of(model__vocab_size=300, train__dtype="bf16")
    with pytest.raises(UserError, match=r"'old' has no tflops for bf16 \(it has: fp32\)"):
        forecast.plan_on(config, entries, [], None)
    mixed = forecast.plan_on(config.replace(**{"train.dtype": "fp32"}), entries, [2], None)
    alike = forecast.plan_on(config.replace(**{"train.dtype": "fp32"}), entries[1:], [2], None)
    assert [e.seconds for e in mixed.estimates] == [e.seconds for e in alike.estimates]
