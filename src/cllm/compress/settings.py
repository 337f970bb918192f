"""What ``cllm compress`` can be asked for, and what it refuses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cllm.compress.coded_fit import CodedSpec
from cllm.compress.decoders import METHODS, Decoder
from cllm.compress.grids import GridSpec, grid_spec
from cllm.compress.lattices.blocks import LATTICES
from cllm.compress.lattices.fixed import FixedSpec
from cllm.compress.problem import ORDERS
from cllm.compress.pruning import parse_pattern
from cllm.compress.rotation import ROTATIONS
from cllm.compress.scales import SCALES
from cllm.core.errors import UsageError, nearest

FLOATS = ("fp32", "fp16", "bf16")
CASTS = (*FLOATS, "int8")
"""Methods that look at the weights alone; int8 rounds to the nearest with a scale for each row."""
GRIDS = ("int", "gguf-q4_0", "gguf-q8_0", "coded", "e8", "leech")
TABLES = ("auto", "lattice", "own", *CASTS)
GROUPS = ("32", "64", "128", "row")
METRICS = ("auto", "inputs", "model")
RANGE = (0.1, 12.0)
"""Bits a weight of entropy-coded matrices."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is compressed.

    Attributes:
        bits: a weight of the linear layers. On a grid of integers 2, 3, 4 or 8, scales apart; with
            ``coded`` any number, everything counted.
        method: a decoder (``rtn``, ``babai``, which is GPTQ, ``k-best``…) or a cast (``fp16``…,
            ``int8``).
        grid: ``int``, llama.cpp's ``gguf-q4_0`` or ``gguf-q8_0``, ``coded``: points without bounds,
            entropy coded, or ``e8`` or ``leech``: fixed-rate codebooks of blocks of 8 or 24 columns.
        lattice: of ``coded``: ``z`` (integers), or ``e8`` or ``leech`` in blocks.
        rotate: ``hadamard`` rounds a randomly rotated matrix, which readers rotate back.
        group: columns that share a scale on the grids ``int``, ``e8`` and ``leech``.
        symmetric: no offset beside the scale; ``None`` means from 4 bits on.
        beams: of K-best; trials of Klein's.
        sweeps: of coordinate descent after the decoder.
        scales: ``range``, ``search``, ``least-squares`` (see ``cllm.compress.scales``).
        metric: what an error costs: that of the layer's ``inputs`` (H = Σ xxᵀ), or of the ``model``'s
            predictions, too (see ``cllm.compress.output_metric``); ``auto`` is ``model`` for K-best on
            integers that are not rotated, and ``inputs`` for all else.
        order: of decision (see ``cllm.compress.problem``).
        columns: steps of columns with ``coded`` (see ``cllm.compress.coded_fit``).
        price: of a bit with ``coded``.
        tokens: of calibration text.
        prune: a share of each layer's weights that is set to 0, as in ``50%``, or ``2:4``, with the error
            made up for (SparseGPT); what is left is stored as ``method`` says: ``fp16``, ``bf16``,
            ``fp32``, or ``babai`` on the grid ``int``.
        recover: steps of training afterwards (see ``cllm.compress.recovery``), which with ``recover_codes``
            may move the integers, too.
        table: how token tables are stored: ``lattice`` at ``table_bits`` a number, int8 rows, a cast, or
            ``own``: the points of the lattice that they were trained on. ``auto`` is ``own`` where they
            were trained on one, and ``lattice`` else.
    """

    bits: float = 4.0
    method: str = "k-best"
    grid: str = "int"
    lattice: str = "z"
    rotate: str = "none"
    group: str = "128"
    symmetric: bool | None = None
    beams: int = 16
    sweeps: int = 1
    scales: str = "least-squares"
    metric: str = "auto"
    order: str = "act"
    columns: str = "uniform"
    price: float = 0.12
    tokens: int = 32_768
    prune: str = ""
    recover: int = 0
    recover_codes: bool = True
    table: str = "lattice"
    table_bits: float = 6.0

    def __post_init__(self) -> None:
        known = (*METHODS, *CASTS)
        if self.method not in known:
            raise UsageError(
                f"there is no method {self.method!r}{nearest(self.method, known)}; known: "
                f"{', '.join(known)}"
            )
        for name, allowed in (
            ("grid", GRIDS),
            ("lattice", LATTICES),
            ("rotate", ROTATIONS),
            ("group", GROUPS),
            ("scales", SCALES),
            ("metric", METRICS),
            ("order", ORDERS),
            ("table", TABLES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"--{name} is one of {', '.join(allowed)}, not {value!r}")
        if self.tokens < 2 or self.beams < 1:
            raise UsageError("calibration takes 2 tokens at least, and K-best 1 beam")
        if not 0.5 <= self.table_bits <= 16:
            raise UsageError(f"a table has 0.5 to 16 bits a number, not {self.table_bits:g}")
        self._check_recovery()
        if self.prune:
            self._check_pruning()
        if self.rotate != "none" and (self.is_cast or self.grid.startswith("gguf")):
            what = self.method if self.is_cast else self.grid
            raise UsageError(f"--rotate turns what cllm reads back; {what} is read without")
        if self.metric == "model" and not self._knows_rows:
            raise UsageError(
                "--metric model decides integers, errors fed back: leave out --prune, --rotate, --lattice, "
                "codebooks, casts and rtn"
            )
        if self.is_cast or (self.prune and self.method in FLOATS):
            return
        if self.is_coded:
            if not RANGE[0] <= self.bits <= RANGE[1]:
                raise UsageError(
                    f"--grid coded takes {RANGE[0]:g} to {RANGE[1]:g} bits a weight, not {self.bits:g}"
                )
            if self.method not in ("rtn", "babai", "k-best"):
                raise UsageError(f"--grid coded takes rtn, babai or k-best, not {self.method}")
        if self.is_fixed and self.method not in ("rtn", "babai"):
            raise UsageError(
                f"--grid {self.grid} takes --method babai or rtn, not {self.method}: "
                "a codebook of blocks has no beams"
            )
        if self.blocks and self.order == "min-pivot":
            raise UsageError("blocks of E8 and Leech points are decided in --order act or natural")
        try:
            specs = self.coded_spec if self.is_coded else self.fixed_spec if self.is_fixed else None
            _ = (self.decoder, specs or self.grid_spec)
        except ValueError as error:
            raise UsageError(f"{error}; --grid coded takes any rate") from error

    def _check_recovery(self) -> None:
        if self.recover < 0:
            raise UsageError(f"--recover takes a number of steps, not {self.recover}")
        if self.recover and (self.is_cast or self.prune):
            what = "pruned weights have" if self.prune else f"{self.method} has"
            raise UsageError(
                f"--recover trains scales, and {what} none: leave it out, or take a grid"
            )
        if self.recover and (self.rotate != "none" or self.lattice != "z" or self.is_fixed):
            raise UsageError(
                "--recover trains integers as they are stored: leave --rotate, --lattice and codebooks out"
            )

    def _check_pruning(self) -> None:
        try:
            parse_pattern(self.prune)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if self.rotate != "none":
            raise UsageError("--prune keeps weights as they are: leave --rotate out")
        if self.method not in (*FLOATS, "babai") or self.grid != "int":
            raise UsageError(
                "--prune stores what is left by --method fp16, bf16, fp32, or babai with --grid int, not "
                f"{self.method} with {self.grid}"
            )

    @property
    def is_cast(self) -> bool:
        """Whether the layers are only cast."""
        return self.method in CASTS and not self.prune

    @property
    def _knows_rows(self) -> bool:
        """Whether rows can be decided one after the other."""
        plain = self.rotate == "none" and not self.blocks and not self.prune
        return plain and not self.is_cast and self.method != "rtn"

    @property
    def by_model(self) -> bool:
        """Whether errors are weighed by what they do to the model's predictions."""
        if self.metric != "auto":
            return self.metric == "model"
        return self._knows_rows and self.method.startswith("k-best")

    @property
    def table_as(self) -> str:
        """How token tables are stored: a cast takes them along. (``auto`` is decided with the run.)"""
        if self.is_cast:
            return self.method
        return "lattice" if self.table == "auto" else self.table

    @property
    def is_coded(self) -> bool:
        """Whether the layers are entropy coded."""
        return self.grid == "coded" and not self.is_cast

    @property
    def is_fixed(self) -> bool:
        """Whether the layers are stored by fixed-rate codebooks of E8 or Leech points."""
        return self.grid in ("e8", "leech") and not self.is_cast

    @property
    def blocks(self) -> str:
        """The lattice whose blocks of columns are decided together, "" where there are none."""
        if self.is_fixed:
            return self.grid
        return self.lattice if self.is_coded and self.lattice != "z" else ""

    @property
    def decoder(self) -> Decoder:
        """The decoder."""
        return Decoder(method=self.method, K=self.beams, sweeps=0 if self.is_plain else self.sweeps)

    @property
    def is_plain(self) -> bool:
        """Whether descent would make the method another one: what is compared stays what it is called."""
        return self.method in ("rtn", "babai", "klein")

    @property
    def grid_spec(self) -> GridSpec:
        """The grid. Raises ``ValueError`` for one that does not exist."""
        if self.bits != int(self.bits):
            raise ValueError(f"a grid has 2, 3, 4 or 8 bits, not {self.bits:g}")
        return grid_spec(int(self.bits), grid=self.grid, symmetric=self.symmetric, group=self.group)

    @property
    def coded_spec(self) -> CodedSpec:
        """How coded integers are chosen."""
        return CodedSpec(price=self.price, columns=self.columns, lattice=self.lattice)

    @property
    def fixed_spec(self) -> FixedSpec:
        """The fixed-rate codebook. Raises ``ValueError`` for one that does not exist."""
        if self.bits != int(self.bits):
            raise ValueError(f"{self.grid} has 2, 3, 4 or 8 bits a weight, not {self.bits:g}")
        group = 0 if self.group == "row" else int(self.group)
        return FixedSpec(lattice=self.grid, bits=int(self.bits), group=group)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)
