"""Blocks of E8 and Leech points: chains of residues, round trips, Shannon's bound, beams, codebooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.compress.codecs import frame
from cllm.compress.coded_fit import CodedSpec, fit_coded
from cllm.compress.decoders import Decoder
from cllm.compress.decoders.block_beam import k_best_blocks
from cllm.compress.decoders.block_plane import block_plane, lattice_of, nearest_points
from cllm.compress.lattices import coding
from cllm.compress.lattices.blocks import E8, LEECH, block_numbers, chain, is_point, runs, units
from cllm.compress.lattices.coding import LatticeMatrix
from cllm.compress.lattices.fixed import (
    FixedSpec,
    from_parts,
    index_of,
    nearest_codes,
    points_of,
)
from cllm.compress.lattices.fixed_fit import fit_fixed
from cllm.compress.problem import problem

KINDS = {"e8": E8, "leech": LEECH}


def points_near(targets: np.ndarray, lattice: str) -> np.ndarray:
    """Integers (m, n) of the points near ``targets``, in units of length."""
    out = np.empty(targets.shape, dtype=np.int64)
    for run in runs(lattice, targets.shape[1]):
        part = targets[:, run.start : run.stop]
        near = lattice_of(run.kind).nearest(part.reshape(-1, run.kind.width))
        out[:, run.start : run.stop] = np.rint(near / run.kind.unit).reshape(part.shape)
    return out


def test_columns_are_shared_out_among_blocks() -> None:
    found = [(run.kind.name, run.start, run.stop) for run in runs("leech", 59)]
    assert found == [("leech", 0, 48), ("e8", 48, 56), ("z", 56, 59)]
    assert block_numbers("e8", 11).tolist() == [0] * 8 + [1, 2, 3]
    assert units("e8", 9).tolist() == [0.5] * 8 + [1.0]
    with pytest.raises(ValueError, match="z, e8, leech, not 'd4'"):
        runs("d4", 24)


@pytest.mark.parametrize("lattice", ["e8", "leech"])
def test_a_chain_in_any_order_holds_the_lattice_and_nothing_else(lattice: str) -> None:
    kind, rng = KINDS[lattice], np.random.default_rng(0)
    points = points_near(rng.normal(0, 5, (300, kind.width)), lattice)
    assert is_point(kind, points).all()
    for moved in (points + np.eye(kind.width, dtype=np.int64)[3], 2 * points + 2):
        inside = lattice_of(kind).contains(moved * kind.unit)
        assert np.array_equal(is_point(kind, moved), inside)
    for _ in range(5):
        links = chain(kind, tuple(rng.permutation(kind.width).tolist()))
        # The first coordinate's parity is m's: a spacing of 1 there.
        volume = np.prod([link.spacing for link in links]) / 2
        assert volume * kind.unit**kind.width == pytest.approx(1)


@given(
    lattice=st.sampled_from(["e8", "leech"]),
    m=st.integers(1, 20),
    n=st.integers(1, 60),
    scale=st.sampled_from([0.0, 0.3, 2.0, 100.0, 1e5]),
    seed=st.integers(0, 999),
)
@settings(max_examples=20, deadline=None)
def test_any_points_come_back(lattice: str, m: int, n: int, scale: float, seed: int) -> None:
    pytest.importorskip("constriction")
    rng = np.random.default_rng(seed)
    values = np.clip(rng.standard_cauchy((m, n)), -50, 50) * scale
    values *= np.exp(rng.normal(0, 1, (m, 1)) + rng.normal(0, 1, (1, n)))
    integers = points_near(values, lattice)
    made = LatticeMatrix(lattice, integers, float(np.float32(0.037)), rng.integers(-9, 9, n))
    back = coding.decode_matrix(coding.encode(made))
    assert np.array_equal(back.integers, integers)
    assert np.array_equal(back.dense(), made.dense())


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("lattice", ["e8", "leech"])
def test_a_gaussian_source_is_coded_at_the_rate_that_theory_gives(lattice: str, bits: int) -> None:
    """½·log2(2πe·G) above Shannon's bound, at real bytes: 0.1460 bit for E8, 0.0839 for Leech."""
    pytest.importorskip("constriction")
    W = np.random.default_rng(bits).normal(size=(600, 480))
    step = float(np.float32(4.13 * 2.0**-bits))
    integers = points_near(W / step, lattice)
    made = LatticeMatrix(lattice, integers, step, np.zeros(480, dtype=np.int64))
    data = coding.encode(made)
    rate = 8 * len(data) / W.size
    assert abs(rate - bits) < 0.03
    gap = rate - 0.5 * np.log2(1 / float(np.mean((W - made.dense()) ** 2)))
    theory = 0.5 * np.log2(2 * np.pi * np.e * lattice_of(KINDS[lattice]).second_moment)
    assert theory == pytest.approx({"e8": 0.1460, "leech": 0.0839}[lattice], abs=1e-4)
    assert abs(gap - theory) < 0.02


def test_no_damage_goes_unseen_even_behind_a_right_checksum() -> None:
    pytest.importorskip("constriction")
    rng = np.random.default_rng(0)
    integers = points_near(rng.normal(0, 2, (12, 56)), "leech")
    made = LatticeMatrix("leech", integers, 0.5, np.zeros(56, dtype=np.int64))
    data = coding.encode(made)
    for place in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(ValueError, match=r"table|matrix"):
            coding.decode(bytes(damaged))
    whole = frame.unpack(data)
    sound = 0
    for _ in range(40):
        body = bytearray(whole.body)
        body[int(rng.integers(len(body)))] = int(rng.integers(256))
        cut = bytes(body)[: int(rng.integers(1, len(body)))]
        with pytest.raises(ValueError, match="damaged"):
            coding.decode(frame.pack(whole.codec, whole.shape, cut))
        try:  # another value may be sound by chance
            values = coding.decode(frame.pack(whole.codec, whole.shape, bytes(body)))
        except ValueError as error:
            sound += "damaged" in str(error)
        else:
            sound += values.shape == whole.shape
    assert sound == 40
    with pytest.raises(ValueError, match="no lattice coder"):
        coding.decode(frame.pack("rows", (1, 1), b""))


def correlated(lattice: str, m: int = 96, n: int = 104, seed: int = 0):
    """Weights and a metric, columns in blocks."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(900, n)) @ (np.eye(n) + rng.normal(size=(n, n)) * 0.2)
    X *= np.geomspace(2, 0.5, n)
    blocks = block_numbers(lattice, n)
    return problem(rng.normal(size=(m, n)), X.T @ X, dtype=torch.float32, blocks=blocks)


def test_a_problem_keeps_blocks_together() -> None:
    p = correlated("e8", n=43)
    numbers = block_numbers("e8", 43)[p.order.numpy()]
    assert (np.diff(numbers) != 0).sum() == numbers.max()
    H = p.H[p.order][:, p.order]
    assert torch.allclose((p.U.T.double() * p.squares) @ p.U.double(), H, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("lattice", ["e8", "leech"])
def test_beams_find_points_and_with_enough_of_them_the_nearest(lattice: str) -> None:
    rng = np.random.default_rng(0)
    W = torch.from_numpy(rng.uniform(-9, 9, (40, 32)))
    p = problem(W, torch.eye(32), damping=0.0, blocks=block_numbers(lattice, 32))
    unit = torch.from_numpy(units(lattice, 32))
    plane = block_plane(p, lattice, torch.ones(1, 32), nearest_points)
    least = (plane - W).square().mean()
    errors = []
    for K in (1, 16, 256):
        found = k_best_blocks(p, lattice, torch.ones(32), K)
        for run in runs(lattice, 32):
            blocks = found[:, run.start : run.stop].long().numpy()
            assert is_point(run.kind, blocks.reshape(-1, run.kind.width)).all()
        errors.append(float((found * unit - W).square().mean() / least))
    assert errors == sorted(errors, reverse=True)
    assert 1 - 1e-9 <= errors[-1] < 1.03


def test_blocks_of_columns_feed_errors_back_as_the_metric_asks() -> None:
    """Each block must be decided at the centre that minimises H over the blocks not decided yet."""
    p = correlated("e8", m=3, n=24)
    step = torch.full((1, 24), 0.3)
    points = block_plane(p, "e8", step, nearest_points)
    W, H, done = p.original().double(), p.H, []
    for number in dict.fromkeys(block_numbers("e8", 24)[p.order.flip(0).numpy()].tolist()):
        block = torch.arange(8 * number, 8 * number + 8)
        rest = torch.tensor([j for j in range(24) if j not in done])
        centre = W[:, rest]
        if done:
            errors = (W - points * step)[:, done]
            centre = centre + errors @ torch.linalg.solve(H[rest][:, rest], H[rest][:, done]).T
        mine = centre[:, torch.searchsorted(rest, block)] / step[:, block]
        assert torch.allclose(lattice_of(E8).nearest(mine), points[:, block])
        done += block.tolist()


@pytest.mark.parametrize(("lattice", "most"), [("e8", 0.95), ("leech", 0.99)])
def test_at_equal_bytes_blocks_come_nearer_than_integers(lattice: str, most: float) -> None:
    pytest.importorskip("constriction")
    target, errors = int(2.5 * 96 * 104 / 8), []
    for name in ("z", lattice):
        p = correlated(name)
        spec = CodedSpec(lattice=name)
        made, data = fit_coded(p, target, Decoder(K=16 if name != "leech" else 64), spec)
        assert 0.95 * target <= len(data) <= target
        errors.append(float(p.objective(torch.from_numpy(made.dense())).sum()))
    assert np.array_equal(coding.decode(data), made.dense())
    assert errors[1] < most * errors[0]


def test_zeros_too_few_bytes_and_unknown_lattices() -> None:
    pytest.importorskip("constriction")
    zero = problem(torch.zeros(4, 9), torch.eye(9), blocks=block_numbers("e8", 9))
    made, data = fit_coded(zero, 200, Decoder(), CodedSpec(lattice="e8"))
    assert not coding.decode(data).any()
    assert not made.dense().any()
    with pytest.raises(ValueError, match=r"10 bytes are fewer than the \d+"):
        fit_coded(correlated("e8"), 10, Decoder(method="babai"), CodedSpec(lattice="e8"))
    with pytest.raises(ValueError, match="z, e8, leech, not 'd4'"):
        CodedSpec(lattice="d4")


@pytest.mark.parametrize("lattice", ["e8", "leech"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_indices_of_a_codebook_are_its_points(lattice: str, bits: int) -> None:
    kind, rng = KINDS[lattice], np.random.default_rng(bits)
    codes = torch.from_numpy(rng.integers(0, 1 << bits, (400, kind.width), dtype=np.uint8))
    points = points_of(kind, codes, bits)
    assert torch.equal(index_of(kind, points, bits), codes)
    # A point of the codebook is nearest to itself.
    assert torch.allclose(nearest_codes(kind, points + 1e-5, bits), points)
    # Far targets get some point of the codebook.
    far = nearest_codes(kind, 10 * points, bits)
    assert torch.allclose(points_of(kind, index_of(kind, far, bits), bits), far)


@pytest.mark.parametrize(
    ("lattice", "bits", "most"), [("e8", 2, 0.105), ("e8", 3, 0.03), ("leech", 2, 0.096)]
)
def test_codebooks_of_normal_weights_beat_a_scalar_grid(
    lattice: str, bits: int, most: float
) -> None:
    """The best uniform scalar quantizers of 2 and 3 bits are at 0.1188 and 0.0374 (Max 1960)."""
    W = torch.from_numpy(np.random.default_rng(0).normal(size=(10, 72)))
    p = problem(W, torch.eye(72), damping=0.0, blocks=block_numbers(lattice, 72))
    made = fit_fixed(p, FixedSpec(lattice=lattice, bits=bits))
    assert float((made.dense() - W).square().mean() / W.square().mean()) < most


def test_rows_of_a_codebook_are_read_alone_and_errors_are_fed_back() -> None:
    p = correlated("e8", m=24, n=75)
    spec = FixedSpec(lattice="e8", bits=3, group=32)
    made = fit_fixed(p, spec)
    parts = made.parts()
    assert parts["scales"].shape == (24, 2)
    one = from_parts(spec, 75, parts["codes"][5:6], parts["scales"][5:6])
    assert torch.equal(one.dense()[0], made.dense()[5])
    plain = fit_fixed(p, spec, by_metric=False)
    near, far = (float(p.objective(x.dense()).sum()) for x in (made, plain))
    assert near < 0.8 * far
    with pytest.raises(ValueError, match="scales for 1 rows"):
        from_parts(spec, 75, parts["codes"][:1], parts["scales"][:2])


def test_a_codebook_that_does_not_exist_is_refused() -> None:
    for wrong in ({"lattice": "z", "bits": 2}, {"lattice": "e8", "bits": 5}):
        with pytest.raises(ValueError, match=r"e8 or leech|2, 3, 4 or 8"):
            FixedSpec(**wrong)  # type: ignore[arg-type]
    zeros = problem(torch.zeros(3, 16), torch.eye(16), blocks=block_numbers("e8", 16))
    assert not fit_fixed(zeros, FixedSpec(lattice="e8", bits=2)).dense().any()
