"""A worker that waits for a random while at every hand-over: ``crew.Crew.program`` of the stress test."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cllm.training.parallel import ending, shared, wire, worker

sys.path.append(str(Path(__file__).parent.parent))
from waits import late

LONGEST = 0.004


def delayed(function: Callable[..., Any], rng: random.Random) -> Callable[..., Any]:
    """``function`` with a random wait before and after it."""
    return late(function, rng, LONGEST)


if __name__ == "__main__":
    seed = random.Random(f"{os.environ['DELAYS']} {sys.argv[-1]}")
    wire.receive = delayed(wire.receive, seed)
    # What was received and is not yet read, then what was computed or updated and is not yet told.
    shared.Shared.share = delayed(shared.Shared.share, seed)  # type: ignore[method-assign]
    for name in ("add_up", "apply"):
        setattr(ending.Ending, name, delayed(getattr(ending.Ending, name), seed))
    worker.main(sys.argv[1:])
