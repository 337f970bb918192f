"""The bench of compression: it runs, keeps what it measured, and judges only what it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllm.bench import compress_cases as known
from cllm.bench import compress_peers, compress_times
from cllm.bench.compress import _claims, run
from cllm.bench.compress_cases import Case, cases
from cllm.bench.compress_kept import Kept
from cllm.bench.compress_peers import PEERS, Rounded
from cllm.bench.compress_plots import Point, certificate_claim, draw, errors_claim, r_squared
from cllm.bench.compress_times import reading_claims, reading_rates, time_claims
from cllm.bench.harness import Options, Result, render, write_results


@pytest.mark.slow
def test_a_quick_run_measures_and_judges_nothing(trained: Path, isolated: Path) -> None:
    pytest.importorskip("constriction")
    options = Options(quick=True, data=(str(trained),))
    result = run(options)
    assert [row["method"] for row in result.rows] == [case.method for case in cases(quick=True)]
    assert all(claim.holds is None for claim in result.claims)
    assert "too small to judge" in render(result)
    rows = {row["method"]: row for row in result.rows}
    # Coded layers take no more bytes than the grid's.
    assert rows[known.CODED_OURS]["bits a weight"] <= rows[known.GPTQ]["bits a weight"]
    assert rows[known.OURS]["rise"] < 0.9 * rows[known.GPTQ]["rise"]
    # Kept: nothing is compressed any more, whatever the time.
    again = run(Options(quick=True, data=(str(trained),), minutes=0))
    assert again.rows == result.rows


def figures(rise: float) -> dict[str, float]:
    """What one case gave."""
    return {"bpb": 2 + rise, "base": 2.0, "bits": 2.25, "bytes": 9, "error": 0.1}


def test_claims_compare_means_over_three_runs_at_least() -> None:
    gptq, ours = Case(method=known.GPTQ, bits=2.0), Case(method=known.OURS, bits=2.0)
    measured = [{gptq: figures(0.1 * k), ours: figures(0.08 * k)} for k in (1, 2, 3)]
    claim = _claims(measured, quick=False)[0]
    assert claim.value == pytest.approx(0.8)
    assert claim.holds is True
    assert "3 runs ± 0.000" in claim.name
    assert _claims(measured[:2], quick=False)[0].holds is None
    measured[0][ours] = figures(0.3)
    assert _claims(measured, quick=False)[0].holds is False


def test_recovered_cases_are_judged_against_recovered_gptq() -> None:
    gptq, ours = (Case(method=m, bits=2.0) for m in (known.RECOVERED_GPTQ, known.RECOVERED_CODED))
    measured = [{gptq: figures(0.1 * k), ours: figures(0.08 * k)} for k in (1, 2, 3)]
    claims = [c for c in _claims(measured, quick=False) if known.RECOVERED_CODED in c.name]
    assert claims[0].value == pytest.approx(0.8)
    assert claims[0].holds is False
    assert gptq.settings(None).recover == ours.settings(2.25).recover == known.RECOVERY


def test_every_kind_of_weight_is_read_and_its_rate_judged(isolated: Path) -> None:
    pytest.importorskip("constriction")
    rates = reading_rates(quick=True)
    assert set(rates) == {
        "integers on a grid",
        "coded integers",
        "coded E8 points",
        "coded Leech points",
        "E8 codebook",
        "Leech codebook",
    }
    assert all(rate > 0 for rate in rates.values())
    low, high = reading_claims({"one": 11.9, "other": 12.1}, "")
    assert (low.holds, high.holds) == (False, True)
    assert reading_claims({"one": 11.9}, "the machine is busy")[0].holds is None


@pytest.mark.slow
def test_times_are_kept_and_compared(trained: Path, isolated: Path) -> None:
    kept = Kept(trained, {"tokens": 256}, float("inf"))
    assert 10_000 < kept.parameters < 10**6
    first = time_claims([kept], quick=False)
    assert first[0].value > 0
    assert first[1].why == "no such run was given"
    assert first[1].holds is None
    # Kept: asked again, with no time left, nothing is compressed.
    again = time_claims([Kept(trained, {"tokens": 256}, 0.0)], quick=False)
    assert again == first


def test_a_large_run_is_timed_by_the_wall(
    trained: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_times, "LARGE", 1)
    monkeypatch.setattr(Kept, "times", lambda *_: {"wall": 301.0, "processor": 450.0, "threads": 2})
    claim = time_claims([Kept(trained, {}, 0.0)], quick=False)[1]
    assert (claim.value, claim.holds) == (301.0, False)
    assert "2 threads, 450 s of processor time" in claim.name


def point(predicted: float, measured: float) -> Point:
    """A prediction that is sure to a tenth."""
    return Point(
        method=known.GPTQ,
        predicted=predicted,
        low=0.9 * predicted,
        high=1.1 * predicted,
        measured=measured,
    )


def test_r_squared_takes_predictions_as_they_are() -> None:
    points = [point(0.01 * k, 0.01 * k) for k in (1, 2, 4)]
    assert r_squared(points) == pytest.approx(1)
    # A prediction that is half of it everywhere would be perfect after a fit.
    assert r_squared([point(0.005 * k, 0.01 * k) for k in (1, 2, 4)]) < 0.5
    assert r_squared(points[:2]) is None
    claim = certificate_claim([*points, point(0.03, 0.05)], quick=False)
    assert "3 of 4 measured ones" in claim.name
    assert certificate_claim(points, quick=True).holds is None
    found = {
        Case(method=known.GPTQ, bits=2.0): {"errors": [(0.1, 0.1), (0.01, 0.01), (0.001, 0.002)]}
    }
    assert errors_claim([found], quick=False).value == pytest.approx(0.93785, abs=1e-4)
    assert errors_claim([{}], quick=False).holds is None


def test_plots_are_written_beside_the_results(isolated: Path) -> None:
    rows = [
        {"method": known.GPTQ, "bits a weight": b, "rise": r} for b, r in ((2.2, 0.1), (3.2, 0.01))
    ]
    plots = draw(rows, [point(0.01, 0.02), point(0.02, 0.02), point(0.05, 0.04)])
    assert set(plots) == {"bits", "certificate"}
    path = write_results(Result(bench="compress", rows=rows, claims=[], plots=plots), ["bench"])
    text = path.read_text(encoding="utf-8")
    for name in plots:
        assert f"![{name}](compress-{name}.svg)" in text
        assert path.with_name(f"compress-{name}.svg").read_bytes().startswith(b"<?xml")
        assert path.with_name(f"compress-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_peer_rounds_is_scored_as_ours_is(trained: Path, isolated: Path) -> None:
    kept = Kept(trained, {"tokens": 512, "recover": 1}, float("inf"))

    def exact(source: Any, bits: int) -> Rounded:
        return Rounded({k: v.float() for k, v in source.weights.items()}, float(bits))

    def half(source: Any, bits: int) -> Rounded:
        return Rounded({k: 0.5 * v.float() for k, v in source.weights.items()}, float(bits))

    same = kept.peer("exact", 2, exact)
    assert same["error"] < 1e-9
    assert same["bpb"] == pytest.approx(same["base"], rel=1e-4)
    gone = kept.peer("half", 2, half)
    assert gone["error"] == pytest.approx(0.25)
    assert gone["bpb"] > same["bpb"]
    # Kept: asked again, nothing is rounded.
    assert kept.peer("exact", 2, half) == same


@pytest.mark.parametrize(
    ("name", "package"), [("HQQ", "hqq"), ("torchao int", "torchao"), ("llama.cpp", "llama_cpp")]
)
def test_peers_round_every_layer_near_to_what_it_was(
    name: str, package: str, trained: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    kept = Kept(trained, {"tokens": 512}, float("inf"))
    if name == "torchao int":
        with pytest.raises(RuntimeError, match="no whole groups of 128"):
            PEERS[name](kept.source, 4)
        monkeypatch.setattr(compress_peers, "GROUP", 64)
    for bits, most in ((8, 1e-4), (4, 0.03)):
        rounded = PEERS[name](kept.source, bits)
        assert bits < rounded.bits < bits + 2
        assert len(rounded.weights) == 8
        for key, values in rounded.weights.items():
            weight = kept.source.weights[key].float()
            assert float((values - weight).square().sum() / weight.square().sum()) < most
    assert (name == "llama.cpp") == bool(rounded.note)
