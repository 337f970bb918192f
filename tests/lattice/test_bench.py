"""The bench's own promises: it runs, and what it measures with is right."""

import torch

from cllm import lattice
from cllm.bench import lattice as bench
from cllm.bench import lattice_decoding as bench_decoding
from cllm.bench import lattice_numbers as bench_numbers
from cllm.bench import lattice_quality as bench_quality
from cllm.bench import lattice_reduction as bench_reduction
from cllm.bench.harness import Claim, Options, render
from cllm.bench.lattice import run
from cllm.bench.lattice_contestant import reduce_or_kill
from cllm.bench.lattice_numbers import token_codes
from cllm.bench.lattice_timing import medians, torch_threads

PARTS = {
    *("speed", "planes", "beams", "root_lattices", "spiral", "codes", "orthogonality", "quality"),
    "shortest_vectors",
}


def named(name):
    def part(quick):
        return [], [Claim(name=name, value=1.0, required=0.5)]

    part.__name__ = name
    return part


def test_medians_leave_the_warm_up_out_and_take_turns():
    calls = []
    seconds = medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert set(seconds) == {"a", "b"}
    assert min(seconds.values()) >= 0


def test_torch_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_reduction_in_a_process_of_its_own_is_the_same_or_ended(q_ary):
    B = q_ary(30, 1009, 0)
    made = reduce_or_kill(B, "bkz", 10, 60.0, kill_after=60.0)
    assert made is not None
    reached, basis = made
    assert reached.finished
    expected = lattice.reduce(B, "bkz", block_size=10).basis
    assert (basis == expected).all()
    assert reached.root_hermite_factor == lattice.root_hermite_factor(expected)
    assert reduce_or_kill(B, "lll", 20, None, kill_after=0.01) is None


def test_on_a_busy_machine_nothing_is_judged(monkeypatch):
    monkeypatch.setattr(bench, "is_busy", lambda: "others kept it busy")
    for module in (bench_decoding, bench_numbers, bench_quality, bench_reduction):
        for name in PARTS & set(vars(module)):
            monkeypatch.setattr(module, name, named(name))
    claims = run(Options()).claims
    assert len(claims) == len(PARTS)
    assert all(claim.holds is None and "busy" in claim.why for claim in claims)
    monkeypatch.setattr(bench, "is_busy", lambda: None)
    assert all(claim.holds for claim in run(Options()).claims)


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
    assert "torch ran on 1 thread" in " ".join(result.notes)
    for kind in ("covariance", "q-ary"):
        assert any(row["job"] == "BKZ-40" and kind in row["case"] for row in result.rows)
