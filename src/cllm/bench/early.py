"""The optimizer in the backward pass beside one at the end: a part of ``cllm bench parallel``.

Without clipping and uncompiled, since there alone the first can be had; what compiling gives stands in the
rows of whole runs.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from cllm.bench.contestants import our_contestant
from cllm.bench.harness import Claim, contest, interleaved, ratio_of_medians, spread

BASE = ["train.compile=off", "train.clip=0"]
WAYS = {
    "uncompiled, no clipping: optimizer at the end": [],
    "uncompiled, no clipping: optimizer in backward": ["train.optimizer_in_backward=true"],
}


def measure(
    quick: bool, why: str, rounds: int, steps: int
) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Rows of tokens a second, and their ratio, which is shown beside."""
    starts = []
    for name, own in WAYS.items():
        call = ["ours", "--bare", "--steps", str(steps), *(["--small"] if quick else [])]
        for setting in (*BASE, *own):
            call += ["--set", setting]
        starts.append(partial(our_contestant, name, "cllm.bench.training_contestant", call))
    with contest(starts) as contestants:
        found = interleaved(contestants, rounds)
    rates = {name: [r["tokens_per_second"] for r in each] for name, each in found.items()}
    rows = [
        {
            "machine": "idle",
            "contestant": name,
            "tokens/s": round(median(values)),
            "lowest–highest": spread(values),
            "peak RSS, MB": round(found[name][-1]["peak_rss"] / 1e6),
        }
        for name, values in rates.items()
    ]
    late, early = rates.values()
    claim = Claim(
        name="optimizer in backward ÷ optimizer at the end, uncompiled, no clipping",
        value=round(ratio_of_medians(early, late), 3),
        required=None,
        why=why or "shown beside",
        judged=False,
    )
    return rows, [claim]
