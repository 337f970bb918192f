"""Contestants that are ours, and several that compete as one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cllm.bench.harness import Contestant
from cllm.core.threads import spin_briefly


def our_contestant(name: str, module: str, arguments: Sequence[str]) -> Contestant:
    """A contestant whose waiting threads spin as briefly as those of ``cllm train``."""
    env = dict(os.environ)
    spin_briefly(env)
    return Contestant(name, module, arguments, env)


class SideBySide(Contestant):
    """Contestants that run their rounds at the same time, and whose tokens are added up: what a machine
    gives to programs that share nothing else. They are closed by whoever started them."""

    def __init__(self, name: str, members: Sequence[Contestant]) -> None:
        self.name, self.members = name, members

    def round(self) -> dict[str, Any]:
        """One round of each. Each counts at its own rate, so that one's end does not count for another."""
        with ThreadPoolExecutor(len(self.members)) as pool:
            found = list(pool.map(lambda member: member.round(), self.members))
        return {
            "tokens_per_second": sum(f["tokens_per_second"] for f in found),
            "peak_rss": max(f["peak_rss"] for f in found),
        }

    def close(self) -> None:
        """Nothing is its own."""
