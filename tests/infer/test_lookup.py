"""The token index against brute force, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.core.errors import UserError
from cllm.infer.lookup import Nearest, TokenIndex, kernel
from cllm.infer.lookup.best import kth_largest_at_least
from cllm.infer.lookup.cells import lattice_cells
from cllm.infer.lookup.regions import block_edges

METRICS = ["ip", "l2", "cosine"]


def brute(table: np.ndarray, queries: np.ndarray, k: int, metric: str) -> Nearest:
    """A scan in float64, written another way than the index's; of equals the lower ids."""
    X, Q = (np.asarray(a, dtype=np.float32).astype(np.float64) for a in (table, queries))
    products = Q @ X.T
    scores = np.array([np.linalg.norm(X - q, axis=1) for q in Q]) if metric == "l2" else products
    if metric == "cosine":
        norms = np.linalg.norm(Q, axis=1)[:, None] * np.linalg.norm(X, axis=1)
        scores = np.divide(scores, norms, out=np.zeros_like(scores), where=norms > 0)
    order = np.argsort(scores if metric == "l2" else -scores, axis=1, kind="stable")[:, :k]
    return Nearest(order, np.take_along_axis(scores, order, 1), np.ones(len(Q), dtype=bool))


def clustered(V: int, D: int, seed: int = 0) -> np.ndarray:
    """Clusters of unlike sizes and widths, lengths that vary."""
    g = np.random.default_rng(seed)
    weights = 1 / np.arange(1, V // 32 + 1)
    labels = g.choice(len(weights), V, p=weights / weights.sum())
    decay = np.arange(1, D + 1) ** -0.5
    centres = g.standard_normal((len(weights), D)) * decay
    rows = centres[labels] + 0.5 * g.standard_normal((V, D)) * decay
    return (rows * np.exp(0.2 * g.standard_normal((V, 1)))).astype(np.float32)


def near(table: np.ndarray, n: int, noise: float, seed: int = 1) -> np.ndarray:
    """Rows of the table with some noise."""
    g = np.random.default_rng(seed)
    rows = table[g.integers(len(table), size=n)]
    return rows + noise * g.standard_normal(rows.shape).astype(np.float32)


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A small table with copies, ties, rows of zeros and outliers, and queries."""
    g = np.random.default_rng(draw(st.integers(0, 2**32)))
    V, D = draw(st.integers(2, 300)), draw(st.integers(1, 20))
    kind = draw(st.sampled_from(["normal", "integers", "few", "constant", "outlier", "line"]))
    table = g.standard_normal((V, D))
    if kind == "integers":  # ties everywhere
        table = g.integers(-2, 3, (V, D)).astype(float)
    elif kind == "few":  # copies and a row of zeros
        table = np.concatenate([np.zeros((1, D)), table])[g.integers(min(V, 4), size=V)]
    elif kind == "constant":
        table[:] = table[0]
    elif kind == "outlier":
        table[g.integers(V)] *= 1e4
    elif kind == "line":
        table = g.standard_normal((V, 1)) * table[:1] + table[-1:]
    table *= 10.0 ** draw(st.integers(-3, 3))
    rows = table[g.integers(V, size=4)]
    queries = np.concatenate([rows, rows + table.std() * g.standard_normal((4, D))])
    # Vectors of 1e9 and more are refused, which has a test of its own.
    longest = 1e8 / max(np.abs(queries[-1]).max(), 1.0)
    queries[-1] *= min(draw(st.sampled_from([0.0, 1.0, 1e2])), longest)
    return table.astype(np.float32), queries.astype(np.float32)


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=30, deadline=None)
@given(
    case=tables(),
    k=st.integers(1, 12),
    plain=st.booleans(),
    lattice=st.sampled_from(["e8", "e8", "leech"]),
)
def test_exact_is_brute_force_with_copies_and_ties(
    metric: str, case: tuple[np.ndarray, np.ndarray], k: int, plain: bool, lattice: str
) -> None:
    table, queries = case
    k = min(k, len(table))
    index = TokenIndex.build(table, plain=plain, cell_size=8, lattice=lattice)
    found, expected = (
        index.query(queries, k, metric, exact=True, budget=1),
        brute(table, queries, k, metric),
    )
    scale = np.abs(queries).max() * np.abs(table).max() * table.shape[1] if metric == "ip" else 1.0
    if metric == "l2":
        scale = np.abs(queries).max() + np.abs(table).max()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-12, atol=1e-13 * scale)
    assert found.proved.all()
    assert all(len(set(row)) == k for row in found.ids.tolist())
    exact = index.query(queries, len(table), metric)  # every row is visited
    order = np.argsort(exact.ids, axis=1)
    own = np.take_along_axis(np.take_along_axis(exact.scores, order, 1), found.ids, 1)
    assert (own == found.scores).all(), "a score is its token's"


@pytest.mark.parametrize("metric", METRICS)
def test_cells_and_a_scan_give_the_same_bits_and_exact_skips_rows(metric: str) -> None:
    table = clustered(20_000, 32)
    queries = near(table, 40, 0.05)
    scan = TokenIndex.build(table, plain=True).query(queries, 10, metric)
    index = TokenIndex.build(table)
    assert index.cells > 50
    exact = index.query(queries, 10, metric, exact=True)
    assert (exact.ids == scan.ids).all()
    assert (exact.scores == scan.scores).all()
    one = index.query(queries[3], 10, metric, exact=True)
    assert (one.ids[0] == exact.ids[3]).all()


def test_a_proof_leaves_most_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from cllm.infer.lookup.best import Best

    table = clustered(20_000, 32)
    queries = near(table, 20, 0.02)
    index = TokenIndex.build(table)
    seen: list[int] = []
    offer, offer_rows = Best.offer, Best.offer_rows
    monkeypatch.setattr(
        Best, "offer", lambda s, keys, p: (seen.append(len(keys)), offer(s, keys, p))
    )
    monkeypatch.setattr(
        Best, "offer_rows", lambda s, keys, n: (seen.append(len(keys)), offer_rows(s, keys, n))
    )
    index.query(queries, 10, "l2", exact=True, budget=256)
    assert sum(seen) < 0.5 * len(table) * len(queries)


@pytest.mark.parametrize(
    ("metric", "lattice"), [("ip", "e8"), ("l2", "e8"), ("cosine", "e8"), ("ip", "leech")]
)
def test_approximate_queries_find_most_in_a_part_of_the_table(metric: str, lattice: str) -> None:
    least = 0.9
    table = clustered(20_000, 32)
    queries = near(table, 100, 0.1)
    index = TokenIndex.build(table, lattice=lattice)
    found = index.query(queries, 10, metric, budget=2000)
    assert not found.proved.any()
    best = brute(table, queries, 10, metric).ids.tolist()
    hits = [len(set(a) & set(b)) / 10 for a, b in zip(found.ids.tolist(), best, strict=True)]
    assert np.mean(hits) >= least
    less = index.query(queries, 10, metric, budget=200).ids.tolist()
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(less, best, strict=True)]) < np.mean(
        hits
    )


def test_a_query_by_distance_goes_to_the_cells_about_it_first() -> None:
    """By the mean and the deviation of its keys alone a cell some deviations off looks better."""
    table = np.random.default_rng(0).standard_normal((20_000, 8)).astype(np.float32)
    queries = table[:100] + 0.01
    index = TokenIndex.build(table, plain=False)
    truth = TokenIndex.build(table, plain=True).query(queries, 10, "l2").ids
    found = index.query(queries, 10, "l2", budget=1000).ids
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True))
    assert hits > 0.9 * truth.size


@pytest.mark.parametrize("exponent", [-7, 0, 8])
def test_promises_are_finite_numbers_for_every_query(exponent: int) -> None:
    table = clustered(3000, 8) * np.float32(10.0**exponent)
    table[:40] = table[0]  # a cell without any spread
    table[50] = 0
    index = TokenIndex.build(table, plain=False, cell_size=16)
    assert index.regions is not None
    queries = np.concatenate([table[:60], np.zeros((1, 8), dtype=np.float32)])
    for metric in METRICS:
        assert np.isfinite(index.regions.promise(queries @ index.regions.rotation, metric)).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("V", "D", "k", "budget", "cell_size"),
    [(4000, 32, 10, 1500, 16), (3000, 7, 1, 1, 8), (500, 64, 40, 499, 8), (2000, 128, 3, 900, 64)],
)
def test_the_kernel_looks_at_what_the_passes_look_at(
    metric: str, V: int, D: int, k: int, budget: int, cell_size: int
) -> None:
    """And at a few rows more: those of one bin of keys. So its k-th best is never worse."""
    if isinstance(reason := kernel.load(), str):
        pytest.skip(reason)
    table = clustered(V, D, seed=V)
    queries = near(table, 40, 0.3)
    index = TokenIndex.build(table, plain=False, cell_size=cell_size)
    ways = [index.query(queries, k, metric, budget=budget, kernel=way) for way in (True, False)]
    fast, slow = (w.scores if metric != "l2" else -w.scores for w in ways)
    assert (fast >= slow).all()
    assert (ways[0].ids == ways[1].ids).mean() > 0.9
    assert np.array_equal(fast, np.sort(fast)[:, ::-1])
    # Whatever is found has the score that brute force gives it.
    every = brute(table, queries, V, metric)
    for i in range(len(queries)):
        scores = dict(zip(every.ids[i].tolist(), every.scores[i].tolist(), strict=True))
        named = [scores[token] for token in ways[0].ids[i].tolist()]
        assert np.allclose(named, ways[0].scores[i], rtol=1e-6, atol=1e-9)


@given(table_and_queries=tables(), metric=st.sampled_from(METRICS))
@settings(max_examples=25, deadline=None)
def test_the_kernel_takes_any_table(
    table_and_queries: tuple[np.ndarray, np.ndarray], metric: str
) -> None:
    """Ties, copies, zeros and outliers: the best of what it looks at, and never a row twice."""
    if isinstance(reason := kernel.load(), str):
        pytest.skip(reason)
    table, queries = table_and_queries
    index = TokenIndex.build(table, plain=False, cell_size=8)
    k = min(3, len(table))
    found = index.query(queries, k, metric, budget=max(1, len(table) // 2), kernel=True)
    assert all(len(set(ids)) == k for ids in found.ids.tolist())
    best = brute(table, queries, k, metric).scores
    worst = np.maximum(1e-6 * np.abs(best), 1e-9)
    better = best - found.scores if metric == "l2" else found.scores - best
    assert (better <= worst).all()


def test_without_a_compiler_a_warning_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cllm.infer.lookup.index.load", lambda: "there is no C++ compiler")
    table = clustered(500, 8)
    index = TokenIndex.build(table, plain=False, cell_size=16)
    with pytest.warns(RuntimeWarning, match=r"array passes.*there is no C\+\+ compiler"):
        found = index.query(table[:2], 2, budget=200)
    assert np.array_equal(found.ids, index.query(table[:2], 2, budget=200, kernel=False).ids)
    with pytest.raises(ValueError, match="no kernel here: there is no"):
        index.query(table[:2], 2, budget=200, kernel=True)


@settings(max_examples=40, deadline=None)
@given(case=tables(), size=st.integers(8, 40), lattice=st.sampled_from(["e8", "leech"]))
def test_cells_hold_every_row_once_and_none_is_much_too_large(
    case: tuple[np.ndarray, np.ndarray], size: int, lattice: str
) -> None:
    table, _ = case
    cells = lattice_cells(table, size, lattice)
    assert sorted(cells.order.tolist()) == list(range(len(table)))
    for start, end in zip(cells.starts[:-1], cells.starts[1:], strict=True):
        rows = table[cells.order[start:end]]
        assert 0 < len(rows) <= 2 * size or (rows == rows[0]).all()


def test_small_tables_are_scanned_and_the_same_table_gives_the_same_index() -> None:
    table = clustered(18_000, 16)
    assert TokenIndex.build(table[:1000]).cells == 0
    first, second = TokenIndex.build(table), TokenIndex.build(torch.from_numpy(table).double())
    assert first.cells == second.cells > 0
    assert (first.rows.ids == second.rows.ids).all()
    assert (first.vector(17) == table[17]).all()


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=700), st.integers(1, 20))
def test_the_quick_threshold_is_reached_by_k(values: list[float], k: int) -> None:
    keys = np.array(values, dtype=np.float32)
    k = min(k, len(keys))
    assert (keys >= kth_largest_at_least(keys, k)).sum() >= k


def test_blocks_cover_the_coordinates() -> None:
    for D in range(1, 300):
        edges = block_edges(D)
        assert edges[0] == 0
        assert edges == sorted(set(edges))
        assert edges[-1] < D


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_a_saved_index_answers_alike(tmp_path: Path, plain: bool, mmap: bool) -> None:
    table = clustered(3000, 24)
    queries = near(table, 10, 0.1)
    index = TokenIndex.build(table, plain=plain)
    index.save(tmp_path / "index")
    index.save(tmp_path / "index")  # an older one is replaced
    loaded = TokenIndex.load(tmp_path / "index", mmap=mmap)
    assert loaded.cells == index.cells
    for metric in METRICS:
        a, b = (i.query(queries, 5, metric, budget=300) for i in (index, loaded))
        assert (a.ids == b.ids).all()
        assert (a.scores == b.scores).all()
    mapped = isinstance(loaded.rows.vectors.base, np.memmap)
    assert mapped == mmap
    assert not mapped or not loaded.rows.vectors.flags.writeable


def test_what_is_damaged_or_foreign_is_refused(tmp_path: Path) -> None:
    TokenIndex.build(clustered(3000, 24), plain=False).save(tmp_path / "index")
    for name in ("starts", "ids", "rotation", "tail"):
        path = tmp_path / "index" / f"{name}.npy"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match="damaged"):
            TokenIndex.load(tmp_path / "index")
        path.write_bytes(whole[:200])
        with pytest.raises(UserError, match="damaged"):
            TokenIndex.load(tmp_path / "index")
        path.unlink()
        with pytest.raises(UserError, match=f"{name}.npy"):
            TokenIndex.load(tmp_path / "index")
        path.write_bytes(whole)
    vectors = tmp_path / "index" / "vectors.npy"
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    TokenIndex.load(tmp_path / "index")  # mapped: not read, so not summed
    with pytest.raises(UserError, match=r"vectors\.npy fails its checksum"):
        TokenIndex.load(tmp_path / "index", mmap=False)
    vectors.write_bytes(whole[:-4])
    with pytest.raises(UserError, match="damaged"):
        TokenIndex.load(tmp_path / "index")
    vectors.write_bytes(whole)
    description = tmp_path / "index" / "index.json"
    body = json.loads(description.read_text())
    description.write_text(json.dumps(body | {"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        TokenIndex.load(tmp_path / "index")
    description.write_text(json.dumps(body | {"parts": {}}))
    with pytest.raises(UserError, match="damaged"):
        TokenIndex.load(tmp_path / "index")
    description.write_text("[]")
    with pytest.raises(UserError, match="is no token index"):
        TokenIndex.load(tmp_path / "index")


def test_a_save_replaces_nothing_but_an_index(tmp_path: Path) -> None:
    index = TokenIndex.build(clustered(100, 4))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x")
    with pytest.raises(UserError, match="is no token index"):
        index.save(tmp_path / "photos")
    assert (tmp_path / "photos" / "one.jpg").read_text() == "x"
    with pytest.raises(UserError, match="no token index"):
        TokenIndex.load(tmp_path / "photos")
    with pytest.raises(UserError, match="there is no token index"):
        TokenIndex.load(tmp_path / "nowhere")


def test_wrong_tables_are_named() -> None:
    good = clustered(50, 8)
    bad = good.copy()
    bad[7, 3] = np.nan
    cases = [
        (bad, r"row 7 of the table of shape \(50, 8\) holds a number that is not finite"),
        (good[:1], r"shape \(1, 8\).*V of at least 2"),
        (good[0], r"shape \(8,\)"),
        (good[:, :0], r"shape \(50, 0\)"),
        (good.astype(str), "not numbers"),
        (good * 1e10, "scale it"),
        (good.astype(np.float64) * 1e-12, "scale it"),
        (good.astype(np.float64) * 1e300, "not finite in float32"),
    ]
    for table, message in cases:
        with pytest.raises(ValueError, match=message):
            TokenIndex.build(table)
    with pytest.raises(ValueError, match="lattice must be one of e8, leech, got 'd4'"):
        TokenIndex.build(good, lattice="d4")
    with pytest.raises(ValueError, match="cell_size must be at least 8"):
        TokenIndex.build(good, cell_size=1)


@pytest.mark.parametrize("plain", [True, False])
def test_wrong_queries_are_named(plain: bool) -> None:
    table = clustered(50, 8)
    index = TokenIndex.build(table, plain=plain)
    with pytest.raises(ValueError, match=r"\(1, 9\) do not fit a table of shape \(50, 8\)"):
        index.query(np.ones(9))
    with pytest.raises(ValueError, match="not finite"):
        index.query(np.full(8, np.inf))
    with pytest.raises(ValueError, match="scale them down"):
        index.query(np.full(8, 1e30))
    with pytest.raises(ValueError, match="k must be in 1…50"):
        index.query(table[:2], 51)
    with pytest.raises(ValueError, match="k must be in 1…50"):
        index.query(table[:2], 2.5)
    with pytest.raises(ValueError, match=r"'cosin' is none of .* \(did you mean 'cosine'\?\)"):
        index.query(table[:2], 5, "cosin")
    with pytest.raises(ValueError, match="budget"):
        index.query(table[:2], 5, budget=0)
    with pytest.raises(ValueError, match="token 50 is not in"):
        index.vector(50)
    assert index.query(np.empty((0, 8)), 3).ids.shape == (0, 3)
