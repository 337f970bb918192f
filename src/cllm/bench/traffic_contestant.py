"""A process of torchrun that trains as ``cllm train`` does, and counts what the processes send each other.

``torchrun … -m cllm.bench.traffic_contestant STEPS SETTING…``: the first answers rounds
(``cllm.bench.harness``), the others follow it. Collectives are those of torch's profiler, which sees each
from its call to its end; what two processes of one machine write down is on one clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from cllm.bench.harness import answer_rounds
from cllm.bench.sockets import sent_since, sent_so_far
from cllm.core.config import Config
from cllm.core.settings import merge, parse_setting
from cllm.core.torchrun import launched, leave
from cllm.training.build import build
from cllm.training.choose import choose
from cllm.training.distributed.group import Group
from cllm.training.distributed.team import Team, enlist, obey

WARM_UP = 3
Span = tuple[int, int]
"""Nanoseconds at which a collective began and ended in one process."""


def main() -> None:
    """Train with the others, and measure a round whenever the first is asked to."""
    steps, settings = int(sys.argv[1]), sys.argv[2:]
    launch = launched()
    assert launch is not None
    group = Group.join(launch)
    if not launch.is_first:
        _follow(group)
        leave(0)
    config = choose(merge(Config(), dict(map(parse_setting, settings)))).config
    model, own = build(config)
    model.train()
    Team.assemble(group, config, own)
    train, shape = config.train, (config.train.batch_size, config.model.context + 1)
    assert config.model.vocab_size is not None
    text = torch.randint(config.model.vocab_size, shape)
    batch = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step() -> object:
        return own([batch] * train.accumulate, train.lr)

    def one_round() -> dict[str, Any]:
        group.share_json(steps)
        return _measured(step, steps, group)

    group.share_json(WARM_UP)
    _measured(step, WARM_UP, group)
    answer_rounds({}, one_round)
    group.share_json(0)
    leave(0)


def _follow(group: Group) -> None:
    member = enlist(group)
    assert member is not None
    obey(group, member)  # to load
    while steps := group.share_json():
        _measured(lambda: obey(group, member), steps, group)


def _measured(step: Callable[[], object], steps: int, group: Group) -> dict[str, Any]:
    """``seconds`` of a step, bytes ``sent`` in one by the process that sends most, and seconds of the
    ``collectives`` of each."""
    dist.barrier()
    before, begin = sent_so_far(), time.perf_counter()
    for _ in range(steps):
        step()
    seconds = (time.perf_counter() - begin) / steps
    sent = sent_since(before) / steps
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            step()
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name().startswith("gloo:")]
    spans = sorted((e.start_ns(), e.end_ns()) for e in events)
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, (sent, spans))
    return {
        "seconds": seconds,
        "sent": max(each[0] for each in found),
        "collectives": communication([each[1] for each in found], steps),
    }


def communication(processes: Sequence[Sequence[Span]], steps: int) -> list[list[float]]:
    """Seconds of each collective of each step, from when the last process came to it to when the last was
    done: what one waits for another that still computes is not in them."""
    each, left = divmod(len(processes[0]), steps)
    assert not left
    joint = [
        (max(end for _, end in spans) - max(begin for begin, _ in spans)) / 1e9
        for spans in zip(*processes, strict=True)
    ]
    return [joint[n : n + each] for n in range(0, len(joint), each)]


if __name__ == "__main__":
    main()
