"""The ladder of the older system's workload: which rungs there are, and what the pipeline's one trains."""

from __future__ import annotations

import pytest

from cllm.bench import original
from cllm.bench.original_contestant import ours, windows, workload
from cllm.training import choose

PLAIN = ["train.compile=off", "train.dtype=fp32", "train.threads=1", "train.attention=matmul"]
WORDS = [f"word{n * n % 977}" for n in range(original.WORDS)]


@pytest.mark.parametrize(("bf16", "left_out"), [(0.1, True), (3.0, False)])
def test_rungs_of_emulated_bf16_are_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, bf16: float, left_out: bool
) -> None:
    monkeypatch.setattr(choose, "matmul_rates", lambda threads: {"fp32": 1.0, "bf16": bf16})
    monkeypatch.setattr(original, "usable_threads", lambda: 2)
    calls, why = original._rungs()
    assert ("compiled step, bf16" not in calls) is left_out
    assert ("bf16 products" in why) is left_out
    assert {"plain loop (torch modules, fp32, one thread)", original.BEST} <= set(calls)


def test_the_pipeline_trains_with_its_delay_and_begins_anew(isolated: object) -> None:
    batches = windows(WORDS)
    found = {}
    for mode in ("off", "delayed"):
        reset, train = ours(workload(2, [*PLAIN, f"train.pipeline.mode={mode}"]))
        first = train(batches, 2)
        reset()
        found[mode] = train(batches, 2)
        assert found[mode] == first
    assert found["delayed"] != found["off"]  # as it is with the delay
