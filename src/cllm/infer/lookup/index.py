"""The index of a token table, and its queries."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cllm.core.errors import nearest
from cllm.infer.lookup.cells import LATTICES, lattice_cells
from cllm.infer.lookup.kernel import Skim, load
from cllm.infer.lookup.metric import METRICS, Nearest, Rows
from cllm.infer.lookup.regions import Regions
from cllm.infer.lookup.scan import scan
from cllm.infer.lookup.search import Search, most_promising

PLAIN_BELOW = 16_384
"""Tables of fewer rows are scanned, which finds all: at 12,000 rows many queries at once took no longer
so than through the cells, and one a fifth of a millisecond, up to twice as long (``cllm bench lookup``)."""
CELL_SIZE = 128
_LIMITS = (1e-9, 1e9)
"""Lengths whose fourth powers float32 still holds."""
_LEADING = 64


class TokenIndex:
    """Finds the tokens whose vectors are closest to given ones.

    Rows are sorted into cells of E8 in their leading principal coordinates (``cells``), after the norm
    was appended that makes all rows equally long, so that closeness and inner product agree (Bachrach
    et al., "Speeding up the Xbox recommender system using a Euclidean transformation for inner-product
    spaces", RecSys 2014). A query ranks the cells' centres, looks at the rows of the best cells, and if
    it is to be exact, at all others that a bound does not rule out.
    """

    def __init__(self, rows: Rows, regions: Regions | None) -> None:
        """Use ``TokenIndex.build`` or ``TokenIndex.load``."""
        self.rows, self.regions = rows, regions
        self._reach = rows.reach
        self._skims: dict[str, Skim] = {}

    @classmethod
    def build(
        cls,
        table: Any,
        *,
        plain: bool | None = None,
        cell_size: int = CELL_SIZE,
        lattice: str = "e8",
    ) -> TokenIndex:
        """Index a table (V, D), NumPy or torch, of any floating type; float32 is kept.

        ``plain`` leaves the cells out, so that every query is a scan; none means: for fewer than
        ``PLAIN_BELOW`` tokens. ``cell_size`` is the number of tokens that a cell has, about.
        ``lattice``: whose cells, ``e8`` or ``leech``. Memory: the table, and about as much again while the
        index is built, a quarter of it after. The same table gives the same index.

        Raises:
            ValueError: an unknown lattice, or the table is not (V, D) with at least two rows and one
                column, not finite, or has rows (other than zeros) shorter than 1e-9 or longer than 1e9.
        """
        vectors = _as_matrix(table, "table")
        if len(vectors) < 2:
            raise ValueError(
                f"table of shape {vectors.shape} has no two tokens to choose between; give (V, D)"
                " with V of at least 2"
            )
        if cell_size < 8:
            raise ValueError(f"cell_size must be at least 8, got {cell_size}")
        if lattice not in LATTICES:
            raise ValueError(f"lattice must be one of {', '.join(LATTICES)}, got {lattice!r}")
        rows = Rows.of(vectors, np.arange(len(vectors)))
        _check_norms(np.sqrt(2 * rows.half.astype(np.float64)), vectors)
        if plain is None:
            plain = len(vectors) < PLAIN_BELOW
        if plain:
            return cls(rows, None)
        order, starts, rotation = _sort(vectors, rows, cell_size, lattice)
        rows = Rows(vectors[order], order.astype(np.int32), rows.half[order], rows.inverse[order])
        return cls(rows, Regions.of(rows, starts, rotation))

    @property
    def shape(self) -> tuple[int, int]:
        """(V, D) of the table."""
        V, D = self.rows.vectors.shape
        return V, D

    @property
    def cells(self) -> int:
        """The number of cells; 0 where queries are scans."""
        return 0 if self.regions is None else len(self.regions.starts) - 1

    def query(
        self,
        vectors: Any,
        k: int = 10,
        metric: str = "ip",
        *,
        exact: bool = False,
        budget: int | None = None,
        kernel: bool | None = None,
    ) -> Nearest:
        """The k closest tokens of each of vectors (n, D) or (D,).

        ``metric``: ``ip`` (largest inner product), ``l2`` (least Euclidean distance) or ``cosine``
        (largest cosine; 0 with a vector of zeros). ``budget``: tokens that an approximate query looks
        at; none means ``usual_budget``. ``exact`` goes on until no other token can be closer: the answer is
        that of a scan in float64, of equals the lower ids first. Scores are in float64, of the table and
        the vectors as float32 has them.

        ``kernel``: approximate queries go through a compiled kernel (True: raises ``ValueError`` where
        none can be compiled), through array passes (False), or through the kernel where there is a C++
        compiler and else through passes, with a warning once (None). Both look at the same cells.

        Raises:
            ValueError: vectors not (n, D) for the table's D or not finite or longer than 1e9, an
                unknown metric, k not in 1…V, budget below 1.
        """
        queries = self._check(vectors, k, metric, budget)
        if self.regions is None:
            ids, scores = scan(queries, self.rows, k, metric, self._reach)
            return Nearest(ids, scores, np.ones(len(queries), dtype=bool))
        V = self.shape[0]
        rows_to_see = usual_budget(metric, V) if budget is None else budget
        out = Nearest(
            np.empty((len(queries), k), dtype=np.int64),
            np.empty((len(queries), k)),
            np.full(len(queries), exact or rows_to_see >= V),
        )
        skim = None if exact or rows_to_see >= V else self._skim(metric, kernel)
        for start in range(0, len(queries), 64):
            block = queries[start : start + 64]
            rotated = block @ self.regions.rotation
            promise = self.regions.promise(rotated, metric)
            for i, query in enumerate(block):
                search = Search(query, self.rows, self.regions, k, metric, self._reach)
                if skim is not None:
                    error = search.best.error
                    way = skim(query, rotated[i], promise[i], k=k, budget=rows_to_see, error=error)
                    search.best.offer_rows(*way)
                else:
                    cells = most_promising(promise[i], self.regions.sizes, k, rows_to_see)
                    search.go(rotated[i], cells, exact=exact, skim=rows_to_see < V)
                out.ids[start + i], out.scores[start + i] = search.best.answer()
        return out

    def _skim(self, metric: str, kernel: bool | None) -> Skim | None:
        """The compiled way of approximate queries, or none."""
        if kernel is False:
            return None
        assert self.regions is not None
        if metric not in self._skims:
            function = load()
            if isinstance(function, str):
                if kernel:
                    raise ValueError(f"approximate queries have no kernel here: {function}")
                # Python shows a warning of one place and text once.
                warnings.warn(
                    f"approximate queries run as array passes, about half as fast: {function}",
                    RuntimeWarning,
                    stacklevel=3,
                )
                return None
            self._skims[metric] = Skim(function, self.rows, self.regions, metric)
        return self._skims[metric]

    def vector(self, token: int) -> np.ndarray:
        """The row (D,) float32 of a token.

        Raises:
            ValueError: there is no such token.
        """
        if not 0 <= token < self.shape[0]:
            raise ValueError(f"token {token} is not in 0…{self.shape[0] - 1}")
        return np.array(self.rows.vectors[int(np.flatnonzero(self.rows.ids == token)[0])])

    def save(self, path: str | Path) -> None:
        """Write the index as a directory of .npy files (see ``storage.save``)."""
        from cllm.infer.lookup import storage

        storage.save(self.rows, self.regions, Path(path))

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = True) -> TokenIndex:
        """Read what ``save`` wrote, the vectors as they are needed with ``mmap`` (see
        ``storage.load``)."""
        from cllm.infer.lookup import storage

        return cls(*storage.load(Path(path), mmap=mmap))

    def _check(self, vectors: Any, k: int, metric: str, budget: int | None) -> np.ndarray:
        V, D = self.shape
        if metric not in METRICS:
            known = ", ".join(METRICS)
            raise ValueError(f"metric {metric!r} is none of {known}{nearest(str(metric), METRICS)}")
        if not (_is_whole(k) and 1 <= k <= V):
            raise ValueError(f"k must be in 1…{V} for a table of {V} tokens, got {k}")
        if budget is not None and not (_is_whole(budget) and budget >= 1):
            raise ValueError(f"budget must be a whole number of at least 1, got {budget}")
        queries = _as_matrix(vectors, "vectors")
        if queries.shape[1] != D:
            raise ValueError(
                f"vectors of shape {queries.shape} do not fit a table of shape {(V, D)};"
                f" give vectors of shape (n, {D})"
            )
        if np.abs(queries).max(initial=0.0) > _LIMITS[1] / D**0.5:
            raise ValueError(
                f"vectors of shape {queries.shape} are longer than {_LIMITS[1]:g}; scale them down"
            )
        return queries


def usual_budget(metric: str, V: int) -> int:
    """Tokens that an approximate query looks at unless it is told: about 95% of the ten closest are found
    so on the bench's clustered tables, at every size. Cells are cut for inner products, hence the others
    need more."""
    if metric == "ip":
        return int(24 * V**0.5)
    return int(max(min(96 * V**0.5, V / 6), 2048))


def _is_whole(number: Any) -> bool:
    return isinstance(number, int | np.integer)


def _as_matrix(values: Any, name: str) -> np.ndarray:
    """float32 (n, D), contiguous; a single vector becomes one row."""
    if hasattr(values, "detach"):
        values = values.detach().to("cpu").float().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {array.dtype}, not numbers; give floats of shape (n, D)")
    if array.ndim == 1 and name != "table":
        array = array[None]
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} has shape {array.shape}; give (n, D) with D of at least 1")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    for start in range(0, len(array), 1 << 14):
        block = array[start : start + (1 << 14)]
        if not np.isfinite(block).all():
            row = start + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise ValueError(
                f"row {row} of the {name} of shape {array.shape} holds a number that is not finite in"
                " float32; mend or remove that row"
            )
    return array


def _check_norms(norms: np.ndarray, vectors: np.ndarray) -> None:
    low, high = _LIMITS
    if not np.isfinite(norms).all() or norms.max() > high:
        raise ValueError(f"table of shape {vectors.shape} has rows longer than {high:g}; scale it")
    short = (norms < low) & vectors.any(axis=1)
    if short.any():
        raise ValueError(
            f"table of shape {vectors.shape} has rows other than zeros shorter than {low:g};"
            " scale it, or set them to zero"
        )


def _sort(
    vectors: np.ndarray, rows: Rows, cell_size: int, lattice: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order of the rows, where cells start, rotation to principal coordinates)."""
    D = vectors.shape[1]
    sample = vectors[:: -(-len(vectors) // 100_000)]
    centred = sample - sample.mean(axis=0, dtype=np.float64).astype(np.float32)
    _, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    rotation = np.ascontiguousarray(axes[:, ::-1], dtype=np.float32)
    m = min(D, _LEADING)
    points = np.empty((len(vectors), m + 1), dtype=np.float32)
    np.matmul(vectors, rotation[:, :m], out=points[:, :m])
    squares = 2 * rows.half
    points[:, m] = np.sqrt(squares.max() - squares)
    cells = lattice_cells(points, cell_size, lattice)
    return cells.order, cells.starts, rotation
