"""Memory stays flat: a process prepares a corpus, and its peak resident size is what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="peak memory is read by getrusage")

PROGRAM = """
import json, resource, sys, time
from pathlib import Path
from cllm.core.config import DataConfig, TokenizerConfig
from cllm.text.corpus import prepare
def peak():
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (1 << 20 if sys.platform == "darwin" else 1 << 10)
start, first = time.perf_counter(), peak()
report = prepare(DataConfig(paths=(sys.argv[1],)), TokenizerConfig(), Path(sys.argv[2]),
                 seed=0, context=128).report
print(json.dumps({"before": first, "peak": peak(), "seconds": time.perf_counter() - start,
                  "bytes": report.bytes, "sample": report.sample_bytes}))
"""


def prepared(place: Path, size: int) -> dict[str, float]:
    """Grow a corpus of ``size`` bytes, prepare it in a process of its own; memory is in MiB."""
    grow = Path(__file__).with_name("grow.py")
    subprocess.run([sys.executable, str(grow), str(place / "c.txt"), str(size)], check=True)
    arguments = [sys.executable, "-c", PROGRAM, str(place / "c.txt"), str(place / "data")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_thirty_megabytes(tmp_path: Path) -> None:
    """About 100 MiB on top, whatever the size: the buffers of one batch and of the trainer. The text as
    one string and its four million tokens as a list alone would take 190."""
    result = prepared(tmp_path, 30_000_000)
    assert result["bytes"] > 30_000_000
    assert result["peak"] - result["before"] < 160


@pytest.mark.slow
def test_a_gigabyte(tmp_path: Path) -> None:
    result = prepared(tmp_path, 1_000_000_000)
    print(result)
    assert result["bytes"] > 1_000_000_000
    assert 90_000_000 < result["sample"] <= 100_000_000
    assert result["peak"] < 1500
