"""Scales and offsets of a grid: by range, by search, and by least squares with the decoder in the loop."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cllm.compress.decoders import Decoder
from cllm.compress.grids import Grid, GridSpec, as_stored, range_grid
from cllm.compress.problem import Problem

SCALES = ("range", "search", "least-squares")
# Shares of a group's range that are tried: at few bits clipping pays.
SHRINKS = {2: (1.0, 0.88, 0.77, 0.68, 0.6, 0.53, 0.46), 3: (1.0, 0.93, 0.86, 0.79, 0.72, 0.65)}
MORE = (1.0, 0.97, 0.93, 0.89, 0.84)


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
    if problem.rows is not None:
        return _by_rows(problem, spec, decoder, scales, rounds)
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


def _by_rows(
    problem: Problem, spec: GridSpec, decoder: Decoder, scales: str, rounds: int
) -> tuple[Grid, Tensor]:
    m, n = problem.shape
    codes = torch.empty(m, n, dtype=torch.int64)
    scale = torch.empty(m, spec.groups(n), dtype=torch.float64)
    offset = None if spec.symmetric else torch.empty_like(scale)

    def decide(rows: Tensor, wanted: Tensor) -> Tensor:
        grid, codes[rows] = fit_grid(
            problem.with_weight(wanted), spec, decoder, scales=scales, rounds=rounds
        )
        scale[rows] = grid.scale.double()
        if offset is not None and grid.offset is not None:
            offset[rows] = grid.offset.double()
        return grid.values(codes[rows])

    assert problem.rows is not None
    problem.rows.each(problem.original(), decide)
    return Grid(spec, n, scale, offset), codes


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
    group, count = spec.group_of(n), spec.groups(n)
    H, W = problem.H, problem.original().double()
    m = len(W)
    kinds = [codes.double()] if spec.symmetric else [codes.double(), torch.ones(m, n).double()]
    # (unknowns, m, n): what a unit of each unknown adds to the row, times H; only its group's columns add.
    size = spec.group or max(n, 1)
    spread = torch.stack(
        [
            own @ rows
            for k in kinds
            for own, rows in zip(k.split(size, 1), H.split(size), strict=True)
        ]
    )
    sums = [
        spread.new_zeros(*spread.shape[:2], count).index_add_(2, group, spread * k) for k in kinds
    ]
    A = torch.cat(sums, dim=2).transpose(0, 1).contiguous()
    b = torch.einsum("amn,mn->ma", spread, W)
    unknowns = torch.cat([grid.scale] if grid.offset is None else [grid.scale, grid.offset], dim=1)
    # A small pull to the present values keeps unknowns that the codes do not determine.
    pull = 1e-9 * torch.diagonal(A, dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)
    A.diagonal(dim1=1, dim2=2).add_(pull[:, None])
    b += pull[:, None] * unknowns
    solved = torch.linalg.solve(A, b)
    solved = torch.where(torch.isfinite(solved), solved, unknowns)
    scale, offset = solved[:, :count], None if grid.offset is None else as_stored(solved[:, count:])
    return replace(grid, scale=as_stored(scale), offset=offset)
