"""Chunks of a batch on torch's number of threads, each chunk on one.

The passes over a chunk are too short for a team of threads to share; whole chunks are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def for_each(work: Callable[[int], None], starts: Sequence[int]) -> None:
    """Call ``work`` with each of ``starts``, in any order; what one raises is raised."""
    threads = min(torch.get_num_threads(), len(starts))
    if threads <= 1:
        for start in starts:
            work(start)
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, starts):
                pass
    finally:
        torch.set_num_threads(before)  # threads to come take the number that was set last
