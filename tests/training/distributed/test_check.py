"""What several processes cannot do is refused by name, and shares are fair: without a process."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cllm.core.config import Config
from cllm.core.errors import UsageError, UserError
from cllm.core.torchrun import Launch, launched
from cllm.store.run import RunDirectory
from cllm.training.choose import choose
from cllm.training.distributed.check import check_team
from cllm.training.distributed.entry import EndedRunError, earlier_run
from cllm.training.distributed.group import JOIN_PATIENCE, Group, Kind, LostProcessError, Order
from cllm.training.distributed.shards import Shards
from cllm.training.distributed.shares import evaluation_parts, packed
from cllm.training.distributed.stages import Stages
from cllm.training.parallel.shards import deal_evenly

STAGES = {"train__pipeline__mode": "stages"}
TWO_EACH = STAGES | {"train__pipeline__schedule": "zbv"}


@pytest.mark.parametrize(
    ("size", "changes", "why"),
    [
        (3, {}, r"the 4 windows of a step .* do not divide into 3 processes"),
        (2, {"train__parallel__workers": 2}, r"train\.parallel\.workers = 2.*leave it out"),
        (2, {"model__norm": "batchnorm"}, "batchnorm"),
        (2, {"train__loss": "sampled", "train__sampled__candidates": 8}, "sampled"),
        (2, {"train__similarity__weight": 0.1}, "similarity"),
        (2, {"train__dtype": "fp16", "train__parallel__strategy": "fsdp"}, r"train\.dtype"),
        (4, STAGES | {"model__n_layers": 3}, r"makes 4 stages, but model\.n_layers = 3"),
        (2, TWO_EACH | {"model__n_layers": 3}, r"train\.pipeline\.schedule = 'zbv'.*4 stages"),
        (1, STAGES, "two processes"),
        (2, STAGES | {"train__batch_size": 3}, r"train\.batch_size = 3.*multiple of 2"),
        (2, STAGES | {"train__pipeline__micro_batches": 3}, r"micro_batches = 3 must be"),
        (2, STAGES | {"train__parallel__strategy": "fsdp"}, r"train\.parallel\.strategy"),
        (2, {"train__device": "cuda:0"}, r"train\.device = 'cuda:0'.* say cuda"),
    ],
)
def test_refusals(
    size: int, changes: dict[str, Any], why: str, config_of: Callable[..., Config]
) -> None:
    config = config_of(**{"model__n_layers": 2} | changes)
    launch = Launch(rank=0, size=size, local_rank=0, local_size=size, job="a")
    with pytest.raises(UsageError, match=why):
        check_team(config, launch)


def test_stages_without_torchrun_are_refused(config_of: Callable[..., Config]) -> None:
    config = config_of(**STAGES, model__vocab_size=300)
    with pytest.raises(UsageError, match=r"train\.pipeline\.mode = 'stages' needs .*torchrun"):
        choose(config)


def test_processes_share_the_cores(
    config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name, value in zip(names, "0202", strict=True):
        monkeypatch.setenv(name, value)
    config = config_of(model__vocab_size=300, train__threads="auto", train__compile="auto")
    assert launched() is None
    alone = choose(config).config.train
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    launch = launched()
    assert launch is not None
    assert launch.size == 2
    train = choose(config.replace(train__parallel__strategy="fsdp")).config.train
    assert isinstance(alone.threads, int)
    assert train.threads == max(alone.threads // 2, 1)
    assert train.compile == "off"
    assert train.parallel.workers == 1


def test_stages_say_that_they_do_not_chunk_the_head(
    config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    for name, value in zip(names, ("0", "2", "0", "2", "none"), strict=True):
        monkeypatch.setenv(name, value)
    base = STAGES | {"model__vocab_size": 300, "model__n_layers": 2}
    auto = choose(config_of(**base))
    assert auto.config.train.loss_chunk == 0
    assert auto.reasons["loss_chunk"].startswith("0: the last stage takes all logits")
    (warning,) = choose(config_of(**base, train__loss_chunk=50)).warnings
    assert warning.startswith("train.loss_chunk = 50 is not used")


def test_stages_score_as_many_windows_as_they_are_filled_with(
    config_of: Callable[..., Config],
) -> None:
    config = config_of(**STAGES, train__accumulate=3)
    for scores, rows in ((True, 12), (False, 4)):
        stages = SimpleNamespace(config=config, scores=scores, size=2)
        assert Stages.rows_at_once(stages, 4) == rows  # type: ignore[arg-type]
    stages = SimpleNamespace(config=config, rows_at_once=lambda rows: 12, size=2)
    ids = torch.zeros((12, 3), dtype=torch.int64)
    windows = Stages.evaluation_windows(stages, ids, ids)  # type: ignore[arg-type]
    assert [tuple(w.shape) for w in windows] == [(2, 1, 12, 3)] * 2


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("Connection closed by peer", True),
        ("failed to reach the store", True),
        ("cannot restore the file", False),
        ("storage is too small", False),
    ],
)
def test_what_torch_says_of_a_lost_process(text: str, lost: bool) -> None:
    launch = Launch(rank=0, size=2, local_rank=0, local_size=2, job="a")
    group = Group(launch, None, None, [])  # type: ignore[arg-type]
    with pytest.raises(LostProcessError if lost else RuntimeError) as error, group.watching():
        raise RuntimeError(text)
    assert isinstance(error.value, LostProcessError) == lost


def test_a_torchrun_that_was_killed_at_the_start_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        launch = Launch(rank=0, size=2, local_rank=0, local_size=2, job="a")
        began = time.monotonic()
        with pytest.raises(UserError, match="torchrun is gone"):
            Group.join(launch)
        assert time.monotonic() - began < JOIN_PATIENCE.total_seconds()


@pytest.mark.parametrize(
    ("state", "attempt", "code"),
    [("diverged", 1, 1), ("finished", 2, 0), ("diverged", 0, None), ("interrupted", 1, None)],
)
def test_what_ended_is_not_trained_anew(
    state: str, attempt: int, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = SimpleNamespace(state=state, facts={"job": "a"}, reason="it broke")
    monkeypatch.setattr(RunDirectory, "status", lambda run: status)
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text("{}")
    launch = Launch(rank=0, size=2, local_rank=0, local_size=2, job="a", attempt=attempt)
    if code is None:
        found = earlier_run(launch, run)
        assert (found is not None) == (state == "interrupted")
        return
    with pytest.raises(EndedRunError, match=f"ended before: {state}") as error:
        earlier_run(launch, run)
    assert error.value.exit_code == code


def test_no_device_ever_has_the_whole_model(config_of: Callable[..., Config]) -> None:
    """Shards are made on no device first; torch's process group without processes stands in for four."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found = func(*args, **kwargs or {})
            plain = isinstance(found, torch.Tensor) and not isinstance(found, DTensor)
            if plain and found.device.type != "meta":
                made.append(found.untyped_storage().nbytes())
            return found

    changes = {"train__parallel__strategy": "fsdp", "train__loss_chunk": 0, "model__n_layers": 1}
    config = config_of(**changes, model__vocab_size=4096)
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        with Watch():
            shards = Shards(config, 4, None)
    finally:
        dist.destroy_process_group()
    table = 4 * 4096 * config.model.d_model
    assert {p.device.type for p in shards.model.parameters()} == {"cpu"}
    assert table // 4 <= max(made) < table


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_shares_are_equal_and_cover_all_windows_in_order(
    batch: int, accumulate: int, processes: int
) -> None:
    try:
        shares = deal_evenly(batch, accumulate, processes)
    except ValueError:
        assert batch * accumulate % processes
        return
    assert len(shares) == processes
    assert len({tuple(s.last - s.first for s in share) for share in shares}) == 1
    taken = [(s.micro, row) for share in shares for s in share for row in range(s.first, s.last)]
    assert taken == [(m, row) for m in range(accumulate) for row in range(batch)]
    number = torch.arange(accumulate * batch).view(accumulate, batch, 1)
    windows = [packed([(n, -n) for n in number], share) for share in shares]
    assert len({w.shape for w in windows}) == 1
    assert sorted(torch.cat([w[0].flatten() for w in windows]).tolist()) == list(
        range(accumulate * batch)
    )


def test_a_short_batch_is_filled_with_rows_that_count_for_nothing() -> None:
    ids = torch.arange(15).view(5, 3)
    parts = evaluation_parts(ids, ids + 1, 2)
    assert [tuple(part.shape) for part in parts] == [(2, 1, 3, 3)] * 2
    targets = torch.cat([part[1, 0] for part in parts])
    assert torch.equal(targets[:5], ids + 1)
    assert bool((targets[5:] == -100).all())


@given(
    st.lists(st.floats(allow_nan=False), max_size=8),
    st.integers(0, 2**62),
    st.sampled_from(Kind),
)
def test_orders_arrive_as_they_were_given(numbers: list[float], seed: int, kind: Kind) -> None:
    order = Order(kind, tuple(numbers), seed, (2, 1, 4, 64))
    assert Order.unpack(order.pack()) == order
