"""Contestants that are ours."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cllm.bench.harness import Contestant
from cllm.core.threads import spin_briefly


def our_contestant(name: str, module: str, arguments: Sequence[str]) -> Contestant:
    """A contestant whose waiting threads spin as briefly as those of ``cllm train``."""
    env = dict(os.environ)
    spin_briefly(env)
    return Contestant(name, module, arguments, env)
