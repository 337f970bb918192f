"""What ``cllm bench compress`` compares: methods at bits, each a setting of ``cllm compress``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cllm.compress.settings import Settings

COMMON = Settings(table="fp16", group="128", symmetric=False, sweeps=1)
"""Tables are stored in fp16 by all, so that what differs is the linear layers."""

RTN, GPTQ, LOOP, AWARE, OURS, INPUTS, WIDE = (
    "rtn",
    "GPTQ",
    "GPTQ, scales in the loop",
    "GPTQ, the model's metric",
    "k-best 16",
    "k-best 16, the inputs' metric",
    "k-best 64",
)
RECOVERED_GPTQ, RECOVERED_OURS, RECOVERED_CODED = (
    "GPTQ, recovered",
    "k-best 16, recovered",
    "k-best 16, entropy coded, recovered",
)
RECOVERY = 200
"""Steps of recovery."""
ROTATED = "k-best 16, rotated"
FIXED_E8, FIXED_LEECH, FIXED_TURNED = (
    "E8 codebook",
    "Leech codebook",
    "E8 codebook, rotated",
)
CODED_GPTQ, CODED_OURS, CODED_WATER, CODED_E8, CODED_LEECH, CODED_TURNED = (
    "GPTQ, entropy coded",
    "k-best 16, entropy coded",
    "k-best 16, entropy coded, water-filled",
    "k-best 16 on E8, entropy coded",
    "k-best 64 on Leech, entropy coded",
    "k-best 16, entropy coded, rotated",
)

_GRID = {
    RTN: replace(COMMON, method="rtn", scales="search"),
    # Act-order, the scales of least error of those searched, sequential calibration.
    GPTQ: replace(COMMON, method="babai", scales="search"),
    LOOP: replace(COMMON, method="babai", scales="least-squares"),
    OURS: replace(COMMON, method="k-best", beams=16, scales="least-squares"),
    AWARE: replace(COMMON, method="babai", scales="search", metric="model"),
    INPUTS: replace(COMMON, method="k-best", beams=16, metric="inputs"),
    WIDE: replace(COMMON, method="k-best", beams=64, scales="least-squares"),
    RECOVERED_GPTQ: replace(COMMON, method="babai", scales="search", recover=RECOVERY),
    RECOVERED_OURS: replace(COMMON, beams=16, recover=RECOVERY),
    ROTATED: replace(COMMON, method="k-best", beams=16, rotate="hadamard"),
    FIXED_E8: replace(COMMON, grid="e8", method="babai"),
    FIXED_LEECH: replace(COMMON, grid="leech", method="babai"),
    FIXED_TURNED: replace(COMMON, grid="e8", method="babai", rotate="hadamard"),
}
_CODED = {
    CODED_GPTQ: replace(COMMON, grid="coded", method="babai", price=0.0),
    CODED_OURS: replace(COMMON, grid="coded", method="k-best", beams=16),
    RECOVERED_CODED: replace(COMMON, grid="coded", beams=16, recover=RECOVERY),
    CODED_WATER: replace(COMMON, grid="coded", method="k-best", beams=16, columns="water"),
    CODED_E8: replace(COMMON, grid="coded", lattice="e8", method="k-best", beams=16),
    CODED_LEECH: replace(COMMON, grid="coded", lattice="leech", method="k-best", beams=64),
    CODED_TURNED: replace(COMMON, grid="coded", method="k-best", rotate="hadamard"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method at nominal bits. ``coded`` ones get the bytes that ``GPTQ`` takes at those bits on its grid,
    scales included, or the bits themselves where a grid has none."""

    method: str
    bits: float

    @property
    def coded(self) -> bool:
        """Whether any rate is possible."""
        return self.method in _CODED

    def settings(self, grid_bits: float | None) -> Settings:
        """The setting; ``grid_bits``: what a weight takes on the grid at these bits."""
        if self.coded:
            return replace(_CODED[self.method], bits=grid_bits or self.bits)
        return replace(_GRID[self.method], bits=self.bits)


def cases(quick: bool) -> list[Case]:
    """In the order of importance: what the claims need comes first."""
    if quick:
        names = (GPTQ, OURS, CODED_GPTQ, CODED_OURS, RECOVERED_GPTQ)
        return [Case(method=m, bits=2.0) for m in names]
    found = [
        Case(method=method, bits=bits)
        for bits in (2.0, 3.0)
        for method in (GPTQ, OURS, CODED_GPTQ, CODED_OURS)
    ]
    recovered = (RECOVERED_GPTQ, RECOVERED_OURS, RECOVERED_CODED)
    found += [Case(method=OURS, bits=4.0), Case(method=CODED_OURS, bits=4.0)]
    found += [Case(method=method, bits=2.0) for method in recovered]
    found += [Case(method=method, bits=2.0) for method in (AWARE, INPUTS)]
    coded = (CODED_GPTQ, CODED_OURS)
    found += [Case(method=method, bits=bits) for bits in (2.5, 1.5) for method in coded]
    found += [Case(method=method, bits=8.0) for method in (GPTQ, OURS, CODED_OURS)]
    lattices = (CODED_E8, CODED_LEECH)
    found += [Case(method=method, bits=bits) for bits in (2.0, 3.0) for method in lattices]
    found += [Case(method=method, bits=bits) for bits in (2.0, 3.0) for method in (WIDE, RTN)]
    found += [Case(method=GPTQ, bits=4.0)]
    others = (ROTATED, CODED_TURNED, FIXED_E8, FIXED_TURNED, FIXED_LEECH, LOOP, CODED_WATER)
    found += [Case(method=method, bits=2.0) for method in others]
    rest = (AWARE, INPUTS, LOOP, ROTATED, CODED_TURNED, FIXED_E8, FIXED_TURNED, FIXED_LEECH)
    found += [Case(method=method, bits=3.0) for method in rest]
    return found
