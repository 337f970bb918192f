"""Saves checkpoints in a loop until it is killed (run by test_kill.py as a process of its own).

Each line on standard input starts a process that does so. It is forked, so that importing torch is paid
once and not for every kill.
"""

import os
import sys
from pathlib import Path

import torch

from cllm.store import checkpoint, steps
from cllm.store.metrics import MetricsLog
from cllm.store.run import RunDirectory


def main(path: Path) -> None:
    torch.set_num_threads(1)
    run = RunDirectory.open(path)
    known = run.steps()
    first = known[-1] if known else 0
    with (
        run.training(from_step=first),
        MetricsLog(run.metrics, resume_from=first if first else None) as log,
    ):
        steps.discard_after(run.path, first)
        print(os.getpid(), flush=True)
        for step in range(first + 1, first + 100_000):
            log.write(step, "train", loss=1.0 / step, time={"seconds": 0.1})
            tensor = torch.full((200, 100), float(step))
            checkpoint.save(
                path,
                step,
                weights={"w": tensor},
                optimizer={"m": tensor + 1},
                state={"step": step},
                keep_last=2,
                best=step % 3 == 0,
            )


if __name__ == "__main__":
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            main(Path(sys.argv[1]))
            os._exit(1)
        os.waitpid(child, 0)
        print("dead", flush=True)
