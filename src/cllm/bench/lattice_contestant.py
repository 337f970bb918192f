"""One reduction, timed; as a process of its own where it has to be ended from outside.

``python -m cllm.bench.lattice_contestant IN.npy METHOD BLOCK SECONDS OUT.npy`` prints one JSON line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What a reduction took and reached: seconds, root Hermite factor, decibels over flat."""

    seconds: float
    finished: bool
    root_hermite_factor: float
    mean_ratio_db: float


def reduce_timed(
    B: np.ndarray, method: str, block: int, limit: float | None
) -> tuple[Reached, np.ndarray]:
    """Reduce B; ``limit`` is ``reduce``'s ``max_seconds``."""
    from cllm import lattice

    started = time.perf_counter()
    result = lattice.reduce(B, method, block_size=block, max_seconds=limit)
    seconds = time.perf_counter() - started
    reached = Reached(
        seconds=seconds,
        finished=result.finished,
        root_hermite_factor=lattice.root_hermite_factor(result.basis),
        mean_ratio_db=lattice.mean_ratio_db(result.basis),
    )
    return reached, result.basis


def reduce_or_kill(
    B: np.ndarray, method: str, block: int, limit: float | None, kill_after: float
) -> tuple[Reached, np.ndarray] | None:
    """``reduce_timed`` in a process that is ended after ``kill_after`` seconds: then ``None``.

    fplll's LLL and a tour of BKZ cannot be interrupted.
    """
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place) / "in.npy", Path(place) / "out.npy"
        np.save(given, B)
        arguments = [str(given), method, str(block), "none" if limit is None else str(limit)]
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, *arguments, str(made)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                timeout=kill_after,
            )
        except subprocess.TimeoutExpired:
            return None
        return Reached(**json.loads(done.stdout)), np.load(made)


def main() -> None:
    """The process's side."""
    given, method, block, limit, made = sys.argv[1:]
    seconds = None if limit == "none" else float(limit)
    reached, basis = reduce_timed(np.load(given), method, int(block), seconds)
    np.save(made, basis)
    print(json.dumps(asdict(reached)))


if __name__ == "__main__":
    main()
