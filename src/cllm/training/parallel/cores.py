"""Which processor cores processes of this machine take."""

from __future__ import annotations

import os

from cllm.core.config import Config


def cores_of_workers(config: Config) -> list[list[int]]:
    """The processor cores of each worker, ``train.threads`` each; none where they are not to be pinned.

    That is where others may want some of the cores, as a second run would the very same ones, while the
    rest stays idle: the system then places them better. Together the workers must have all cores that this
    process may run on.
    """
    train = config.train
    assert isinstance(train.parallel.workers, int)
    assert isinstance(train.threads, int)
    return cores_of_processes(train.threads, train.parallel.workers)


def cores_of_processes(each: int, count: int) -> list[list[int]]:
    """``each`` of this process's cores for each of ``count`` processes; none unless that is all of them."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) != each * count:
        return []
    return [mine[n * each : (n + 1) * each] for n in range(count)]
