"""How long a waiting thread spins before it sleeps.

The threads of an OpenMP team wait for each other after every operation. GNU's runtime (the one in
torch's Linux packages) lets them spin for milliseconds before they sleep; on a machine where another
program wants the core, a spinning thread burns the very time that the thread it waits for needs. A
short spin was measured to cost nothing on an idle machine and to halve the step on a busy one (see
``docs/speed.md``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

SPIN_COUNT = "2000"
"""Rounds of GNU OpenMP's waiting loop: some 20 µs, about the work of one small operation."""


def spin_briefly(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Ask GNU OpenMP for a short spin, unless the user asked for something.

    It reads the environment once, when torch is loaded. False if that is too late or not wanted.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environ.keys():
        return False
    if environ is os.environ and "torch" in sys.modules:
        return False
    environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    return True
