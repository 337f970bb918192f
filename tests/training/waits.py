"""Random waits around what hands something over, for programs that tests start."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any


def late(call: Callable[..., Any], rng: random.Random, longest: float) -> Callable[..., Any]:
    """``call`` with a wait of up to ``longest`` seconds around it, or none half the time."""

    def wait() -> None:
        time.sleep(max(rng.uniform(-longest, longest), 0.0))

    def made(*arguments: Any, **named: Any) -> Any:
        wait()
        found = call(*arguments, **named)
        wait()
        return found

    return made
