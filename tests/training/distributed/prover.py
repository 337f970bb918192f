"""Run by torchrun: several strategies one after the other against one process, all in float64.

``torchrun … prover.py OUT STEPS CASE…``, a CASE being ``key=value,key=value`` of settings. The first
process trains on the same windows alone and writes what it found as JSON lines. With ``DELAYS`` in the
environment, a seed, each waits at random at every hand-over.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from cllm.core.settings import build as settings
from cllm.core.settings import parse_setting
from cllm.core.torchrun import launched, leave
from cllm.training.build import build_step
from cllm.training.distributed.group import Group
from cllm.training.distributed.team import Team, serve

sys.path.append(str(Path(__file__).parent.parent))
from waits import late

BASE: dict[str, Any] = {
    "model.vocab_size": 97,
    "model.d_model": 32,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.d_ff": 64,
    "model.context": 16,
    "train.batch_size": 8,
    "train.device": "cpu",
    "train.dtype": "fp32",
    "train.attention": "matmul",
    "train.compile": "off",
    "train.lazy_rows": "off",
    "train.loss_chunk": 0,
    "train.threads": 1,
}

HAND_OVERS = {
    dist: ("broadcast", "scatter", "all_reduce", "all_gather_single", "reduce_scatter_single"),
    schedules: ("_batch_p2p", "_wait_batch_p2p"),
}
LONGEST = 0.01


def windows(number: int, count: int, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches of step ``number``, some targets masked: unevenly among the windows."""
    rng = np.random.default_rng(number)
    found = []
    for _ in range(count):
        ids = torch.from_numpy(rng.integers(0, 97, (rows, 17)))
        targets = ids[:, 1:].clone()
        share = np.linspace(0, 0.6, rows)[:, None]
        targets[torch.from_numpy(rng.random((rows, 16)) < share)] = -100
        found.append((ids[:, :-1].contiguous(), targets))
    return found


def compare(case: str, group: Group, steps: int) -> dict[str, Any]:
    """Train as ``case`` says with all processes, and alone; what differs."""
    config = settings(BASE | dict(parse_setting(text) for text in case.split(",") if text))
    train = config.train
    alone_model, alone = build_step(config)
    model, step = build_step(config)
    with torch.no_grad():  # biases and norms that do something
        for p, q in zip(alone_model.parameters(), model.parameters(), strict=True):
            p.add_(0.05 * torch.randn_like(p))
            q.copy_(p)
    alone.refresh()
    alone_model.train()
    model.train()
    team = Team.assemble(group, config, step)
    curves: list[list[float]] = [[], []]
    found: dict[str, Any] = {"case": case}
    for number in range(steps):
        some = windows(number % 7, train.accumulate, train.batch_size)
        for curve, each in zip(curves, (alone, step), strict=True):
            result = each(some, 3e-3)
            curve.append(result.loss)
            found.setdefault("norms", []).append(result.grad_norm)
        if number == 0:  # the first moments are the gradient, clipped and times 1 − β
            team.gather()
            name = next(iter(alone.arena.moments))
            one, other = (s.arena.moments[name] for s in (alone, step))
            found["gradient"] = float((one - other).norm() / one.norm())
            found["worst"] = max(
                (float((a - b).abs().max() / a.abs().max()), key)
                for (key, a), b in zip(
                    alone.arena.layout.views(one).items(),
                    step.arena.layout.views(other).values(),
                    strict=True,
                )
            )
    team.gather()
    found["weights"] = float((alone.arena.weights - step.arena.weights).abs().max())
    found["curve"] = float(np.abs(np.subtract(*curves)).max())
    found["falls"] = float(np.mean(curves[0][:7]) - np.mean(curves[0][-7:]))  # a round of windows
    ids, targets = windows(99, 1, train.batch_size - 3)[0]
    model.eval()
    alone_model.eval()
    scores = [float(each.evaluate(ids, targets)) for each in (alone, step)]
    found["evaluation"] = abs(scores[0] - scores[1])
    team.group.tell_stop()
    return found


def main() -> None:
    """Each case in turn, in one group."""
    # What a case leaves holds torch's process groups, whose end in the collector waits for ever.
    gc.disable()
    out, steps, *cases = sys.argv[1:]
    torch.set_default_dtype(torch.float64)
    launch = launched()
    assert launch is not None
    if "DELAYS" in os.environ:
        rng = random.Random(f"{os.environ['DELAYS']} {launch.rank}")
        for module, names in HAND_OVERS.items():
            for name in names:
                setattr(module, name, late(getattr(module, name), rng, LONGEST))
    group = Group.join(launch)
    for case in cases:
        torch.manual_seed(1)
        if launch.is_first:
            with Path(out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(compare(case, group, int(steps))) + "\n")
        else:
            serve(group)
    group.abandon()
    with suppress(RuntimeError):
        dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
