"""How fast each kind of compressed weight is read, and how long compressing takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cllm.bench import compress_cases as known
from cllm.bench.compress_kept import Kept
from cllm.bench.harness import Claim
from cllm.compress import coded
from cllm.compress.coded import CodedMatrix
from cllm.compress.decoders.block_plane import lattice_of
from cllm.compress.formats import Parts, read_weight, store_fixed, store_grid
from cllm.compress.grids import GridSpec, range_grid
from cllm.compress.lattices import coding
from cllm.compress.lattices.blocks import runs
from cllm.compress.lattices.coding import LatticeMatrix
from cllm.compress.lattices.fixed import FixedMatrix, FixedSpec
from cllm.compress.layer import as_bytes
from cllm.compress.settings import Settings
from cllm.store.container import Container, Header, Stored, tensor_name, write_container

ROUNDS, ROWS, COLUMNS = 5, 1024, 1024
STEP = 0.85
"""Of lattice points, in standard deviations: about 2.3 bits a weight."""
LEAST, LONGEST, TIMES = 12.0, 300.0, 10.0
"""Million weights a second and core; seconds of a model of 5 to 15 M parameters; K-best over GPTQ."""
LARGE = 5_000_000
NOTE = (
    f"Reading: a matrix of {ROWS:,} × {COLUMNS:,} at 2 to 2.4 bits a weight from a file to float32, "
    f"checksum included, processor time of one thread, the fastest of {ROUNDS} rounds."
)

Weights = Mapping[str, tuple[Stored, Parts]]


def reading_rates(*, quick: bool) -> dict[str, float]:
    """Kind of weight to million weights a second of processor time: ``read_weight`` from a file, its
    checksum and the dense float32 values included, the fastest of some rounds with one thread."""
    rows, rounds = (32, 1) if quick else (ROWS, ROUNDS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as place:
            weights = _weights(rows)
            tensors = {
                tensor_name(name, part): tensor
                for name, (_, parts) in weights.items()
                for part, tensor in parts.items()
            }
            header = Header(
                config="", source={}, method={}, weights={k: w[0] for k, w in weights.items()}
            )
            path = Path(place) / "model.cllm"
            write_container(path, header, tensors, "")
            file = Container.open(path)
            return {name: _rate(file, name, rounds) for name in weights}
    finally:
        torch.set_num_threads(threads)


def _rate(file: Container, name: str, rounds: int) -> float:
    read_weight(file, name)
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        read_weight(file, name)
        seconds.append(time.process_time() - begin)
    return file.header.weights[name].count / min(seconds) / 1e6


def _weights(rows: int) -> Weights:
    """A normal matrix (``rows``, ``COLUMNS``), rows and columns of unlike size, in every kind."""
    random = np.random.default_rng(0)
    # Points are looked for on some rows, which come again: nothing in the coders looks for that.
    some = min(rows, 128)
    sizes = np.exp(random.normal(0, 0.3, (some, 1)) + random.normal(0, 0.3, (1, COLUMNS)))
    normal = np.tile(random.normal(size=(some, COLUMNS)) * sizes, (rows // some, 1))
    dense = torch.from_numpy(normal).float()
    grid = range_grid(dense, GridSpec(bits=2, symmetric=False, group=128), 0.8)
    codes = ((dense - grid.offsets(torch.float32)) / grid.steps(torch.float32)).round()
    shape, none = (rows, COLUMNS), np.zeros(COLUMNS, dtype=np.int64)
    found = {"integers on a grid": store_grid(grid, codes.clamp(-2, 1).long())}
    made = {"coded integers": coded.encode(CodedMatrix(_points(normal, "z"), STEP, none))}
    for lattice in ("e8", "leech"):
        points = LatticeMatrix(lattice, _points(normal, lattice), STEP, none)
        made[f"coded {lattice.capitalize()} points"] = coding.encode(points)
    found |= {
        name: (Stored(kind="coded", shape=shape), {"": as_bytes(data)})
        for name, data in made.items()
    }
    indices = torch.from_numpy(random.integers(0, 4, shape, dtype=np.uint8))
    for lattice in ("e8", "leech"):
        spec = FixedSpec(lattice=lattice, bits=2, group=128)
        scales = torch.ones(rows, int(spec.group_of(COLUMNS).max()) + 1, dtype=torch.float16)
        found[f"{lattice.capitalize()} codebook"] = store_fixed(FixedMatrix(spec, indices, scales))
    return found


def _points(normal: np.ndarray, lattice: str) -> np.ndarray:
    """Integers (m, n) of the points of ``lattice`` nearest to ``normal``, steps of ``STEP``."""
    out = np.empty(normal.shape, dtype=np.int64)
    for run in runs(lattice, normal.shape[1]):
        part = normal[:, run.start : run.stop] / STEP
        near = lattice_of(run.kind).nearest(part.reshape(-1, run.kind.width))
        out[:, run.start : run.stop] = np.rint(near / run.kind.unit).reshape(part.shape)
    return out


def reading_claims(rates: Mapping[str, float], why: str) -> list[Claim]:
    """What is required of each kind."""
    return [
        Claim(
            name=f"million weights a second and core, reading {name}",
            value=rate,
            required=LEAST,
            why=why,
            judged=not why,
        )
        for name, rate in rates.items()
    ]


def time_claims(keeps: Sequence[Kept], quick: bool) -> list[Claim]:
    """K-best beside GPTQ on the first run, and the defaults on the first of 5 million parameters or more.

    Both are kept like figures, and measured last where there is time.
    """
    why = "quick: too small to judge" if quick else ""
    pair = [
        keeps[0].times(known.Case(method=method, bits=2.0).settings(None))
        for method in (known.OURS, known.GPTQ)
    ]
    value = None
    if pair[0] is not None and pair[1] is not None:
        value = pair[0]["processor"] / pair[1]["processor"]
    claims = [
        Claim(
            name="processor time of k-best 16 over GPTQ's, 2 bits, scoring included",
            value=value,
            required=TIMES,
            higher_is_better=False,
            why=why or ("" if value else "not measured"),
            judged=not why,
        )
    ]
    large = next((kept for kept in keeps if kept.parameters >= LARGE), None)
    if large is not None:
        claims.append(_large(large.times(Settings()), large.parameters))
    elif not quick:
        claims.append(
            Claim(
                name="seconds to compress a run of 5 million parameters or more",
                value=None,
                required=LONGEST,
                higher_is_better=False,
                why="no such run was given",
                judged=False,
            )
        )
    return claims


def _large(times: Mapping[str, Any] | None, parameters: int) -> Claim:
    name = f"seconds to compress {parameters:,} parameters by the defaults"
    if times is not None:
        name += f" ({times['threads']} threads, {times['processor']:.0f} s of processor time)"
    return Claim(
        name=name,
        value=None if times is None else times["wall"],
        required=LONGEST,
        higher_is_better=False,
        why="" if times is not None else "not measured",
    )
