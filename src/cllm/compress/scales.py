"""Scales and offsets of a grid: by range, by search, and by least squares with the decoder in the loop."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cllm.compress.decoders import Decoder
from cllm.compress.grids import Grid, GridSpec, as_stored, range_grid
from cllm.compress.problem import Problem
from cllm.lattice.threads import for_each

SCALES = ("range", "search", "least-squares")
# Shares of a group's range that are tried: at few bits clipping pays.
SHRINKS = {2: (1.0, 0.88, 0.77, 0.68, 0.6, 0.53, 0.46), 3: (1.0, 0.93, 0.86, 0.79, 0.72, 0.65)}
MORE = (1.0, 0.97, 0.93, 0.89, 0.84)
# Rows that a thread takes at a time.
PIECE = 32


def fit_grid(
    problem: Problem, spec: GridSpec, decoder: Decoder, *, scales: str, rounds: int = 3
) -> tuple[Grid, Tensor]:
    """A grid for ``problem`` and the codes (m, n) of ``decoder`` on it.

    ``range``: the extremes of each group. ``search``: of some shares of the range the one at which the
    decoded row is nearest under H, row by row. ``least-squares``: from there, ``rounds`` of alternating
    least squares: scales (and offsets) that are best for the codes, then codes for the scales; each row
    keeps the best it has seen. Early rounds decide by Babai's nearest plane where the decoder is a
    beam, the last ones by the decoder itself. Where rows are not alone, blocks of them come one after
    the other, each with what it should be given the errors of those before.
    """
    if scales not in SCALES:
        raise ValueError(f"scales must be one of {', '.join(SCALES)}, not {scales!r}")
    whole = problem.original()
    m, n = problem.shape
    codes = torch.empty(m, n, dtype=torch.int64)
    scale = torch.empty(m, spec.groups(n), dtype=torch.float64)
    offset = None if spec.symmetric else torch.empty_like(scale)
    values = torch.empty(m, n)

    def fit(rows: Tensor, wanted: Tensor) -> None:
        alone = problem.with_weight(wanted)
        grid, codes[rows] = _fit_alone(alone, spec, decoder, scales, rounds)
        scale[rows] = grid.scale.double()
        if offset is not None and grid.offset is not None:
            offset[rows] = grid.offset.double()
        values[rows] = grid.values(codes[rows])

    def decide(rows: Tensor, wanted: Tensor) -> Tensor:
        # What is drawn, or reduced once for all rows, is not shared out. The size of what a thread takes
        # must not depend on their number: a product may be summed otherwise for fewer rows.
        size = PIECE if decoder.method in ("rtn", "babai", "k-best") else len(rows)
        for_each(
            lambda start: fit(rows[start : start + size], wanted[start : start + size]),
            range(0, len(rows), size),
        )
        return values[rows]

    if problem.rows is None:
        decide(torch.arange(m), whole)
    else:
        problem.rows.each(whole, decide)
    return Grid(spec, n, scale, offset), codes


def _fit_alone(
    problem: Problem, spec: GridSpec, decoder: Decoder, scales: str, rounds: int
) -> tuple[Grid, Tensor]:
    """``fit_grid`` of rows that are alone."""
    weight = problem.original()
    if scales == "range":
        grid = range_grid(weight, spec)
        return grid, decoder(problem, grid)
    quick = decoder if decoder.method == "rtn" else Decoder(method="babai")
    best = _Best(problem, range_grid(weight, spec), quick)
    for shrink in SHRINKS.get(spec.bits, MORE)[1:]:
        best.offer(range_grid(weight, spec, shrink), quick)
    if scales == "least-squares":
        for _ in range(2 * rounds):
            best.offer(least_squares_grid(problem, best.grid, best.codes), quick)
    if decoder != quick:
        best.offer(best.grid, decoder)
    if scales == "least-squares" and decoder != quick:
        for _ in range(rounds):
            best.offer(least_squares_grid(problem, best.grid, best.codes), decoder)
    return best.grid, best.codes


class _Best:
    """The best grid and codes of each row so far."""

    def __init__(self, problem: Problem, grid: Grid, decoder: Decoder) -> None:
        self.problem, self.grid = problem, grid
        self.codes = decoder(problem, grid)
        self.value = problem.objective(grid.values(self.codes))

    def offer(self, grid: Grid, decoder: Decoder) -> None:
        """Take the rows of ``grid`` that ``decoder`` brings nearer."""
        codes = decoder(self.problem, grid)
        value = self.problem.objective(grid.values(codes))
        better = (value < self.value)[:, None]
        self.value = torch.minimum(value, self.value)
        self.codes = torch.where(better, codes, self.codes)
        offset = self.grid.offset
        if offset is not None and grid.offset is not None:
            offset = torch.where(better, grid.offset, offset)
        self.grid = replace(
            self.grid, scale=torch.where(better, grid.scale, self.grid.scale), offset=offset
        )


def least_squares_grid(problem: Problem, grid: Grid, codes: Tensor) -> Grid:
    """The scales (and offsets) that bring ``codes`` (m, n) nearest under H, each row for itself.

    A row's groups are coupled by H, so that each row solves a system of all of its groups' unknowns;
    groups without a code other than 0 keep theirs. The result is rounded to what the file holds.
    """
    spec, n = grid.spec, grid.columns
    count = spec.groups(n)
    H, W = problem.H, problem.original().double()
    size = spec.group or max(n, 1)

    def by_group(values: Tensor) -> Tensor:
        """(…, n) to the sums (…, groups)."""
        return torch.stack([part.sum(-1) for part in values.split(size, -1)], dim=-1)

    # (groups, m, n): what a unit of each group's scale adds to the row, times H. What one of its offset
    # adds is the same for all rows (groups, n).
    C = codes.double()
    spread = torch.stack(
        [own @ rows for own, rows in zip(C.split(size, 1), H.split(size), strict=True)]
    )
    A = by_group(spread * C).transpose(0, 1)
    b = torch.einsum("gmn,mn->mg", spread, W)
    if not spec.symmetric:
        ones = torch.stack([rows.sum(dim=0) for rows in H.split(size)])
        mixed = by_group(spread).transpose(0, 1)
        alike = by_group(ones).expand(len(W), count, count)
        A = torch.cat([torch.cat([A, mixed], 2), torch.cat([mixed.mT, alike], 2)], dim=1)
        b = torch.cat([b, W @ ones.T], dim=1)
    A = A.contiguous()
    unknowns = torch.cat([grid.scale] if grid.offset is None else [grid.scale, grid.offset], dim=1)
    # A small pull to the present values keeps unknowns that the codes do not determine.
    pull = 1e-9 * torch.diagonal(A, dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)
    A.diagonal(dim1=1, dim2=2).add_(pull[:, None])
    b += pull[:, None] * unknowns
    solved = torch.linalg.solve(A, b)
    solved = torch.where(torch.isfinite(solved), solved, unknowns)
    scale, offset = solved[:, :count], None if grid.offset is None else as_stored(solved[:, count:])
    return replace(grid, scale=as_stored(scale), offset=offset)
