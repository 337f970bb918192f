"""The bench's own promises: it runs, and what it measures with is right."""

from cllm.bench.harness import Options, render
from cllm.bench.lattice import run
from cllm.bench.lattice_numbers import token_codes
from cllm.bench.lattice_timing import medians


def test_medians_leave_the_warm_up_out_and_take_turns():
    calls = []
    seconds = medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert set(seconds) == {"a", "b"}
    assert min(seconds.values()) >= 0


def test_token_codes_are_distinct_and_repeatable():
    first, second = token_codes(100), token_codes(100)
    assert first.integers() == second.integers()
    assert len(set(first.integers())) == 100


def test_quick_run_measures_everything_and_judges_nothing():
    result = run(Options(quick=True))
    names = " ".join(claim.name for claim in result.claims)
    for job in ("LLL", "nearest plane", "K-best", "E8", "Leech", "Ulam", "similarity", "shortest"):
        assert job in names
    assert all(claim.holds is None for claim in result.claims)
    assert all(row["value"] > 0 or "dB" in row["unit"] or "‰" in row["unit"] for row in result.rows)
    assert "quick" in render(result)
