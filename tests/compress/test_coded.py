"""Entropy-coded matrices: round trips, the distance to Shannon's bound, rates that are met, damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from cllm.compress import coded
from cllm.compress.codecs import frame
from cllm.compress.coded import CodedMatrix, bits_like
from cllm.compress.coded_fit import CodedSpec, fit_coded
from cllm.compress.decoders import Decoder
from cllm.compress.problem import problem

pytest.importorskip("constriction")

ZN_GAP = 0.5 * np.log2(2 * np.pi * np.e / 12)


def matrix(integers: np.ndarray, step: float = 1.0, octaves: np.ndarray | None = None):
    """A coded matrix of these integers."""
    n = integers.shape[1]
    return CodedMatrix(integers, step, np.zeros(n, dtype=np.int64) if octaves is None else octaves)


@given(
    m=st.integers(1, 30),
    n=st.integers(1, 40),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e3, 1e6]),
    seed=st.integers(0, 999),
    uneven=st.booleans(),
)
@settings(max_examples=40)
def test_any_integers_come_back(m, n, scale, seed, uneven):
    rng = np.random.default_rng(seed)
    values = rng.standard_cauchy((m, n)) * scale
    if uneven:
        values *= np.exp(rng.normal(0, 2, (m, 1)) + rng.normal(0, 2, (1, n)))
    q = np.rint(np.clip(values, -(2**29), 2**29)).astype(np.int64)
    octaves = rng.integers(-9, 9, n)
    made = matrix(q, float(np.float32(0.037)), octaves)
    back = coded.decode_matrix(coded.encode(made))
    assert np.array_equal(back.integers, q)
    assert np.array_equal(back.octaves, octaves)
    assert np.array_equal(back.dense(), made.dense())


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_a_gaussian_source_is_coded_at_the_rate_that_theory_gives(bits: int) -> None:
    """½·log2(2πe/12) = 0.2546 bit above Shannon's bound, at real bytes, within 0.02."""
    W = torch.from_numpy(np.random.default_rng(bits).normal(size=(600, 500)))
    p = problem(W, torch.eye(500), damping=0.0)
    made, data = fit_coded(p, bits * W.numel() // 8, Decoder(method="babai"), CodedSpec(price=0))
    rate = 8 * len(data) / W.numel()
    distortion = float(np.mean((W.numpy() - made.dense()) ** 2))
    gap = rate - 0.5 * np.log2(1 / distortion)
    assert abs(rate - bits) < 0.02
    assert abs(gap - ZN_GAP) < 0.02


def test_rows_and_columns_of_unlike_size_are_known_to_the_coder() -> None:
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(0, 1, (300, 1)) + rng.normal(0, 1, (1, 200)))
    q = np.rint(rng.normal(size=(300, 200)) * sizes).astype(np.int64)
    rate = 8 * len(coded.encode(matrix(q))) / q.size
    share = special.ndtr((q + 0.5) / sizes) - special.ndtr((q - 0.5) / sizes)
    # What a coder would spend that is told every entry's standard deviation.
    assert rate < 1.05 * -np.log2(np.maximum(share, 1e-12)).mean()


def test_bits_are_counted_as_they_are_spent() -> None:
    rng = np.random.default_rng(0)
    q = np.rint(rng.normal(size=(200, 200)) * np.exp(rng.normal(0, 1, (200, 1)))).astype(np.int64)
    classes, table = bits_like(q)
    told = table[classes, np.minimum(np.abs(q), 255)].sum()
    assert told == pytest.approx(8 * len(coded.encode(matrix(q))), rel=0.05)


def correlated(seed: int = 0, m: int = 96, n: int = 96):
    """Weights and a metric."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(900, n)) @ (np.eye(n) + rng.normal(size=(n, n)) * 0.2)
    X *= np.geomspace(2, 0.5, n)
    return problem(rng.normal(size=(m, n)), X.T @ X, dtype=torch.float32)


@pytest.mark.parametrize("bits", [1.5, 2.5])
def test_at_equal_bytes_beams_and_prices_come_nearer(bits: float) -> None:
    p = correlated()
    target = int(bits * 96 * 96 / 8)
    errors = []
    for decoder, spec in (
        (Decoder(method="babai"), CodedSpec(price=0)),
        (Decoder(K=8), CodedSpec(price=0)),
        (Decoder(K=8), CodedSpec()),
    ):
        made, data = fit_coded(p, target, decoder, spec)
        assert 0.95 * target <= len(data) <= target
        assert np.array_equal(coded.decode(data), made.dense())
        errors.append(float(p.objective(torch.from_numpy(made.dense())).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.9 * errors[0]


def test_water_filling_gives_columns_below_the_level_no_bits() -> None:
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1, 1e-3, 64)
    X = rng.normal(size=(500, 64)) * sizes
    p = problem(rng.normal(size=(80, 64)), X.T @ X, damping=0.0, dtype=torch.float32)
    target = int(1.0 * 80 * 64 / 8)
    water, _ = fit_coded(p, target, Decoder(method="babai"), CodedSpec(price=0, columns="water"))
    plain, _ = fit_coded(p, target, Decoder(method="babai"), CodedSpec(price=0))
    used = np.abs(water.integers).any(axis=0)
    assert used[:10].all()
    assert not used[-10:].any()
    better, worse = (p.objective(torch.from_numpy(w.dense())).sum() for w in (water, plain))
    assert float(better) < 0.5 * float(worse)


def test_too_few_bytes_are_refused_with_the_least() -> None:
    with pytest.raises(ValueError, match=r"10 bytes are fewer than the \d+"):
        fit_coded(correlated(), 10, Decoder(method="babai"), CodedSpec())
    zero = problem(torch.zeros(4, 5), torch.eye(5), dtype=torch.float32)
    assert not fit_coded(zero, 100, Decoder(), CodedSpec())[0].integers.any()
    with pytest.raises(ValueError, match="price"):
        CodedSpec(price=2)


def test_no_damage_goes_unseen_even_behind_a_right_checksum() -> None:
    rng = np.random.default_rng(0)
    data = coded.encode(matrix(np.rint(rng.normal(size=(20, 30)) * 3).astype(np.int64)))
    for place in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(ValueError, match=r"table|matrix"):
            coded.decode(bytes(damaged))
    whole = frame.unpack(data)
    sound = 0
    for _ in range(60):
        body = bytearray(whole.body)
        body[int(rng.integers(len(body)))] = int(rng.integers(256))
        cut = bytes(body)[: int(rng.integers(1, len(body)))]
        with pytest.raises(ValueError, match="damaged"):
            coded.decode(frame.pack(whole.codec, whole.shape, cut))
        try:  # another value may be sound by chance
            values = coded.decode(frame.pack(whole.codec, whole.shape, bytes(body)))
        except ValueError as error:
            sound += "damaged" in str(error)
        else:
            sound += values.shape == whole.shape
    assert sound == 60
    with pytest.raises(ValueError, match="written by"):
        coded.decode(frame.pack("rows", (2, 2), b""))
