"""Codecs: what is encoded comes back as it was decided, and damaged bytes are refused."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.compress import codecs
from cllm.compress.codecs import Lattice, Pca, Rows, decode, frame, table_metric

pytest.importorskip("constriction")

CODECS = {
    "lattice": Lattice(step=0.5),
    "plain": Lattice(step=0.5, basis="plain", lattice="z"),
    "plain e8": Lattice(step=0.5, basis="plain", lattice="e8"),
    "plain leech": Lattice(step=0.5, basis="plain", lattice="leech"),
    "e8": Lattice(step=0.5, basis="rotated", lattice="e8"),
    "leech": Lattice(step=0.5, basis="rotated", lattice="leech"),
    "rows": Rows(bits=3),
    "pca": Pca(rank=3),
}


def table(rows: int = 60, columns: int = 12, seed: int = 0) -> np.ndarray:
    """Correlated columns, rows of unlike sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) * np.geomspace(3, 0.3, columns)
    sizes = np.exp(rng.normal(0, 0.4, (rows, 1)))
    return ((rng.normal(size=(rows, columns)) * sizes) @ mix).astype(np.float32)


WIDE = 26
"""Columns that hold a block of 24 and two more."""


def metric(columns: int = 12, seed: int = 1) -> np.ndarray:
    """Some positive definite metric."""
    hidden = np.random.default_rng(seed).normal(size=(4 * columns, columns))
    return table_metric(hidden.T @ hidden / len(hidden))


def weighted_error(first: np.ndarray, second: np.ndarray, M: np.ndarray) -> float:
    """Mean of e·M·eᵀ over the rows."""
    error = first.astype(np.float64) - second
    return float(np.einsum("vi,ij,vj->", error, M, error) / len(error))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@given(
    rows=st.integers(1, 20),
    columns=st.one_of(st.integers(1, 10), st.integers(24, 26)),
    seed=st.integers(0, 1000),
    exponent=st.sampled_from([-30, -3, 0, 3, 30]),
    kind=st.sampled_from(["plain", "zero rows", "constant column", "constant", "outlier"]),
)
@settings(max_examples=12)
def test_any_table_comes_back(codec, rows, columns, seed, exponent, kind):
    array = np.random.default_rng(seed).normal(size=(rows, columns))
    if kind == "zero rows":
        array[::2] = 0
    elif kind == "constant column":
        array[:, 0] = 3
    elif kind == "constant":
        array[:] = 0.7
    elif kind == "outlier":
        array[0, 0] = 1000
    # The peers' scales are float16; what is beyond is refused, in a test of its own.
    scale = 10.0**exponent if codec.name == "lattice" else 1.0
    array = (array * scale).astype(np.float32)
    if codec.name == "lattice":
        codec = replace(codec, step=0.05 * scale, price=0)
    data = codec.encode(array)
    back = decode(data)
    assert back.shape == array.shape
    assert back.dtype == np.float32
    assert np.isfinite(back).all()
    if codec.name == "lattice":
        # Babai's cell: half a step in each coordinate, little more where basis rows are not orthogonal.
        assert np.abs(back - array).max() <= 0.05 * scale * (0.5 * np.sqrt(columns) + 0.5) * 1.2
    elif codec.name == "rows":
        # Three bits hold the least-squares fit, never worse than storing zeros.
        assert ((back - array) ** 2).sum() <= (array**2).sum() * 1.001 + 1e-30


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_encoding_and_decoding_are_deterministic(codec):
    array, M, counts = table(columns=WIDE), metric(WIDE), np.arange(60)
    data = codec.encode(array, M, frequency=counts)
    assert codec.encode(array.copy(), M.copy(), frequency=counts.copy()) == data
    assert np.array_equal(decode(data), decode(bytes(bytearray(data))))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_no_damage_goes_unseen(codec):
    data = codec.encode(table(columns=WIDE))
    rng = np.random.default_rng(0)
    for place in [*range(30), *rng.integers(0, len(data), 40)]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(ValueError, match=r"table"):
            decode(bytes(damaged))
    for length in [0, 3, 20, len(data) // 2, len(data) - 1]:
        with pytest.raises(ValueError, match=r"table"):
            decode(data[:length])
    with pytest.raises(ValueError, match="after its end"):
        decode(data + b"x")


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_bodies_that_lie_are_refused_behind_a_right_checksum(codec):
    whole = frame.unpack(codec.encode(table(columns=WIDE)))
    rng = np.random.default_rng(1)
    sound = 0
    for _ in range(60):
        body = bytearray(whole.body)
        body[int(rng.integers(min(len(body), 200)))] = int(rng.integers(256))
        cut = bytes(body)[: int(rng.integers(1, len(body)))]
        with pytest.raises(ValueError, match="table"):
            decode(frame.pack(whole.codec, whole.shape, cut))
        try:  # another value may be sound by chance
            values = decode(frame.pack(whole.codec, whole.shape, bytes(body)))
        except ValueError as error:
            sound += "table" in str(error)
        else:
            sound += values.shape == whole.shape and bool(np.isfinite(values).all())
    assert sound == 60


def test_bodies_of_forms_to_come_and_numbers_that_are_none_are_told_apart():
    whole = frame.unpack(Lattice(step=0.5).encode(table()))

    def changed(place: int, value: bytes) -> bytes:
        body = whole.body[:place] + value + whole.body[place + len(value) :]
        return frame.pack(whole.codec, whole.shape, body)

    with pytest.raises(ValueError, match=r"form 6 is not known.*newer"):
        decode(changed(0, b"\x06"))
    for place in (6, 6 + 4 * 12):  # the mean, the factors
        for number in (np.nan, np.inf):
            with pytest.raises(ValueError, match="not finite"):
                decode(changed(place, struct.pack("<f", number)))


def test_foreign_and_newer_bytes_are_named():
    with pytest.raises(ValueError, match="no stored table"):
        decode(b"PK\x03\x04 something else")
    data = bytearray(Rows(bits=4).encode(table()))
    data[4] = 99
    with pytest.raises(ValueError, match="format 99"):
        decode(bytes(data))
    with pytest.raises(ValueError, match=r"codec 'zip'.*lattice"):
        decode(frame.pack("zip", (2, 2), b""))
    head = frame.MAGIC + struct.pack("<BB", 1, 4) + b"rows" + struct.pack("<IIQ", 2**31, 2**31, 0)
    with pytest.raises(ValueError, match="shape"):
        decode(head + struct.pack("<I", zlib.crc32(head)))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_what_is_no_table_is_refused_with_its_shape(codec):
    for bad, message in (
        (np.full((2, 3), np.nan), r"\(2, 3\).*NaN"),
        (np.full((2, 3), np.inf), r"\(2, 3\)"),
        (np.full((2, 3), 1e300), r"\(2, 3\)"),
        (np.zeros(3), r"\(3,\)"),
        (np.zeros((0, 3)), r"\(0, 3\)"),
        (np.array([["a", "b"]]), r"\(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.encode(bad)


def test_metrics_and_frequencies_are_checked():
    array = table()
    lattice = Lattice(step=1.0)
    for bad, message in (
        (np.eye(3), r"\(3, 3\)"),
        (np.zeros((12, 11)), r"\(12, 11\)"),
        (-np.eye(12), "not positive"),
        (np.triu(np.ones((12, 12))), "not symmetric"),
        (np.full((12, 12), np.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            lattice.encode(array, bad)
    for bad in (np.ones(3), np.full(60, -1.0), np.full(60, np.nan)):
        with pytest.raises(ValueError, match=r"60|frequencies"):
            lattice.encode(array, frequency=bad)
    with pytest.raises(ValueError, match="positive trace"):
        table_metric(np.zeros((3, 3)))


@pytest.mark.parametrize("basis", ["rotated", "plain"])
def test_more_bytes_less_distortion(basis):
    array, M = table(200), metric()
    found = []
    for step in (0.1, 0.2, 0.4, 0.8, 1.6):
        data = Lattice(step=step, basis=basis).encode(array, M)
        found.append((len(data), weighted_error(decode(data), array, M)))
    sizes, errors = zip(*found, strict=True)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert list(errors) == sorted(errors)


def test_the_step_is_chosen_for_the_bytes():
    array, M = table(300), metric()
    errors = []
    for size in (800, 1600, 3200):
        data = Lattice(target_bytes=size).encode(array, M)
        assert 0.93 * size <= len(data) <= size
        errors.append(weighted_error(decode(data), array, M))
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ValueError, match="out of reach"):
        Lattice(target_bytes=40).encode(array)


def test_the_metric_decides_what_is_kept():
    array = table(300)
    M = np.diag(np.geomspace(100, 0.01, 12))
    with_metric = decode(Lattice(target_bytes=1500).encode(array, M))
    without = decode(Lattice(target_bytes=1500).encode(array))
    assert weighted_error(with_metric, array, M) < 0.7 * weighted_error(without, array, M)


def test_frequent_rows_are_stored_finer():
    array = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    counts = np.where(np.arange(400) < 200, 10_000, 1)
    back = decode(Lattice(step=0.3, frequency_power=0.25).encode(array, frequency=counts))
    error = ((back - array) ** 2).sum(axis=1)
    assert error[:200].mean() < 0.3 * error[200:].mean()
    same = Lattice(step=0.3).encode(array, frequency=np.full(400, 7))
    assert same == Lattice(step=0.3).encode(array)


def test_columns_without_worth_cost_nothing():
    rng = np.random.default_rng(0)
    low_rank = (rng.normal(size=(500, 4)) @ rng.normal(size=(4, 32))).astype(np.float32)
    full = rng.normal(size=(500, 32)).astype(np.float32) * 2
    assert len(Lattice(step=0.3).encode(low_rank)) < 0.3 * len(Lattice(step=0.3).encode(full))


def test_the_price_of_a_bit_saves_more_than_it_costs():
    array = table(500)
    plain = Lattice(target_bytes=3000, price=0).encode(array)
    priced = Lattice(target_bytes=3000).encode(array)
    M = np.eye(12)
    assert weighted_error(decode(priced), array, M) < weighted_error(decode(plain), array, M)


def test_a_rotation_is_stored_where_it_saves_more_than_it_costs():
    rng = np.random.default_rng(0)
    white = rng.normal(size=(400, 32)).astype(np.float32)
    low_rank = (rng.normal(size=(400, 4)) @ rng.normal(size=(4, 32))).astype(np.float32)
    for array, better in ((white, "plain"), (low_rank, "rotated")):
        chosen = {b: Lattice(step=0.5, basis=b).encode(array) for b in ("auto", "plain", "rotated")}
        assert chosen["auto"] == chosen[better]
        assert len(set(map(len, chosen.values()))) == 2


@pytest.mark.parametrize("lattice", ["e8", "leech"])
def test_blocks_of_original_columns_see_the_metric(lattice):
    array, M = table(300, 48), metric(48)
    codec = Lattice(step=0.5, basis="plain", lattice=lattice, price=0, beams=64)
    with_metric, without = codec.encode(array, M), codec.encode(array)
    assert weighted_error(decode(with_metric), array, M) < weighted_error(decode(without), array, M)


def test_few_rows_store_no_rotation():
    array = np.random.default_rng(0).normal(size=(16, 48)).astype(np.float32)
    chosen = {basis: Lattice(step=0.3, basis=basis).encode(array) for basis in ("auto", "plain")}
    assert chosen["auto"] == chosen["plain"]
    assert len(chosen["plain"]) < len(Lattice(step=0.3, basis="rotated").encode(array))


def test_k_best_on_the_reduced_basis_beats_rounding():
    array = np.random.default_rng(0).normal(size=(300, 10)).astype(np.float32)
    M = table_metric(metric(10) + 30 * np.ones((10, 10)), look_up=False)
    step = 0.5
    back = decode(Lattice(step=step, basis="plain", lattice="z").encode(array, M))
    mean = array.mean(axis=0)
    rounded = mean + np.rint((array - mean) / step) * step
    assert weighted_error(back, array, M) < weighted_error(rounded, array, M)


@pytest.mark.parametrize(("lattice", "beams", "gain"), [("e8", 8, 0.4), ("leech", 64, 0.6)])
def test_blocks_round_better_than_integers(lattice, beams, gain):
    """Theory gives 0.65 and 1.03 dB (Conway & Sloane 1999, table 2.3), less what the models of the blocks
    cost in a table so small."""
    array = np.random.default_rng(0).normal(size=(2000, 72)).astype(np.float32)
    sizes, errors = [], []
    for name in ("z", lattice):
        codec = Lattice(step=0.25, basis="rotated", lattice=name, price=0, beams=beams)
        data = codec.encode(array)
        sizes.append(len(data))
        errors.append(weighted_error(decode(data), array, np.eye(72)))
    # Bits that the files differ by, counted at 6.02 dB a bit.
    bits = 8 * (sizes[0] - sizes[1]) / array.size
    assert 10 * np.log10(errors[0] / errors[1]) + 6.02 * bits > gain


def test_blocks_are_searched_only_where_float32_holds_them():
    array = table()
    step = 1e-6 * float(array.std())
    with pytest.raises(ValueError, match="20 bits"):
        Lattice(step=step, basis="rotated", lattice="e8").encode(array)
    data = Lattice(step=step, basis="rotated").encode(array)
    assert data == Lattice(step=step, basis="rotated", lattice="z").encode(array)


def test_coordinates_that_the_metric_hardly_sees_do_not_stop_the_choice():
    """In the original coordinates they are a thousand times as many steps as in the metric's."""
    array = table(60, 16)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    M = rotation @ np.diag(np.geomspace(1, 1e-12, 16)) @ rotation.T
    M = (M + M.T) / 2
    refused = 0
    for step in np.geomspace(1e-2, 1e-5, 7):
        rotated = Lattice(step=step, basis="rotated").encode(array, M)
        back = decode(Lattice(step=step).encode(array, M))
        worse = weighted_error(back, array, M) / weighted_error(decode(rotated), array, M)
        assert worse < 2
        try:
            Lattice(step=step, basis="plain", lattice="e8").encode(array, M)
        except ValueError as error:
            refused += "too small" in str(error)
    assert refused


@pytest.mark.parametrize(
    ("lattice", "large_where", "step", "left"),
    [
        ("e8", "unseen", 0.01, "rotated"),
        ("e8", "seen", 0.003, "plain"),
        ("z", "unseen", 1e-4, "plain"),
    ],
)
def test_a_way_for_which_the_step_is_too_fine_leaves_the_other(lattice, large_where, step, left):
    """``auto`` takes what is left, and raises where nothing is."""
    rng = np.random.default_rng(0)
    if (
        large_where == "unseen"
    ):  # the table is large in the one direction that costs next to nothing
        v = rng.normal(size=16)
        v /= np.linalg.norm(v)
        M = np.eye(16) - (1 - 1e-6) * np.outer(v, v)
        array = rng.normal(size=(60, 16)) + 1e4 * rng.normal(size=(60, 1)) * v
    else:
        rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
        M = rotation @ np.diag(np.geomspace(1, 1e-12, 16)) @ rotation.T
        M, array = (M + M.T) / 2, table(60, 16)
    codec = Lattice(step=step, lattice=lattice)
    assert codec.encode(array, M) == replace(codec, basis=left).encode(array, M)
    (other,) = {"rotated", "plain"} - {left}
    for refused in (replace(codec, basis=other), replace(codec, step=1e-12)):
        with pytest.raises(ValueError, match=r"too small for .*larger"):
            refused.encode(array, M)


def test_a_stored_rotation_is_as_fine_as_the_metric_asks():
    """A head's metric may stretch errors of the original coordinates by far."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 24)) + 0.02 * rng.normal(
        size=(500, 24)
    )
    M = table_metric(hidden.T @ hidden / 500, look_up=False)
    array = rng.normal(size=(500, 24)).astype(np.float32)
    step = 0.5
    back = decode(Lattice(step=step, basis="rotated", lattice="z", price=0).encode(array, M))
    determinant = np.exp(np.linalg.slogdet(M)[1] / 24)
    assert weighted_error(back, array, M) / determinant / 24 < 1.15 * step**2 / 12


def test_numbers_near_the_end_of_float32_come_back():
    array = np.random.default_rng(0).normal(size=(200, 16))
    for scale in (1e37, 1e-37):
        data = Lattice(target_bytes=3000).encode(array * scale)
        assert len(data) <= 3000
        assert weighted_error(decode(data) / scale, array, np.eye(16)) < 0.2
    largest = np.full((3, 2), 3.4e38) * [[1, -1]] * [[1], [-1], [1]]
    assert np.isfinite(decode(Lattice(step=1e38).encode(largest))).all()


def test_settings_are_checked():
    for bad in (
        {},
        {"step": 1.0, "target_bytes": 5},
        {"step": 0.0},
        {"step": np.nan},
        {"step": 1e39},
        {"target_bytes": 0},
        {"step": 1.0, "basis": "skew"},
        {"step": 1.0, "lattice": "d4"},
        {"step": 1.0, "price": -1.0},
        {"step": 1.0, "precision": 0.0},
    ):
        with pytest.raises(ValueError, match=r"step|target_bytes|basis|lattice|price|precision"):
            Lattice(**bad)
    with pytest.raises(ValueError, match="2 to 8 bits"):
        Rows(bits=1)
    with pytest.raises(ValueError, match="rank"):
        Pca(rank=0)
    with pytest.raises(ValueError, match=r"too small|30 bits"):
        Lattice(step=1e-12).encode(table())
    with pytest.raises(ValueError, match="float16"):
        Rows(bits=4).encode(np.full((2, 2), 1e9))


@given(bits=st.integers(2, 8), seed=st.integers(0, 100), columns=st.integers(1, 9))
@settings(max_examples=20)
def test_rows_store_their_integers_exactly(bits, seed, columns):
    high = (1 << (bits - 1)) - 1
    q = np.random.default_rng(seed).integers(-high, high + 1, size=(5, columns))
    q[:, 0] = high
    array = (q * 0.25).astype(np.float32)
    data = Rows(bits=bits, trials=1).encode(array)
    assert np.array_equal(decode(data), array)
    assert len(data) == len(frame.pack("rows", (5, columns), b"")) + 1 + 10 + -(
        -5 * columns * bits // 8
    )


def test_pca_of_full_rank_keeps_the_table():
    array = table()
    back = decode(Pca(rank=12).encode(array, metric()))
    assert np.abs(back - array).max() < 0.05 * np.abs(array).max()


def test_without_constriction_the_error_names_the_extra(monkeypatch):
    import sys

    from cllm.core.errors import UserError

    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UserError, match=r"cllm\[compress\]"):
        Lattice(step=1.0).encode(table())
    assert decode(Rows(bits=8).encode(table())).shape == (60, 12)


def test_every_codec_decodes_by_its_name():
    assert {c.name for c in CODECS.values()} == set(codecs.CODECS)


def test_a_basis_that_cannot_be_reduced_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    codec = Lattice(step=0.5, basis="plain", lattice="z")
    with pytest.warns(RuntimeWarning, match="pip install fpylll"):
        data = codec.encode(table(), metric())
    assert decode(data).shape == (60, 12)
