"""The lattice E8 = D8 ∪ (D8 + ½), densest in eight dimensions."""

from __future__ import annotations

import numpy as np
import torch

from cllm.lattice.root import RootLattice, flip_worst, parity


class E8(RootLattice):
    """Gosset's lattice, unimodular, minimal norm 2.

    Decoding follows Conway & Sloane 1982 (algorithm 4, the better of two D8 decodings), both cosets
    from one rounding: with d = x - round(x), the errors are |d| in D8 and ½ - |d| in D8 + ½.
    """

    name = "E8"
    dimension = 8
    unit = 0.5
    volume = 1.0
    minimal_norm = 2.0
    kissing_number = 240
    second_moment = 929 / 12960

    def integer_generator(self) -> np.ndarray:
        basis = 2 * np.eye(8, dtype=np.int64) - 2 * np.eye(8, k=-1, dtype=np.int64)
        basis[0, 0] = 4
        basis[7] = 1
        return basis

    def _contains(self, integers: torch.Tensor) -> torch.Tensor:
        same = (integers % 2 == integers[:, :1] % 2).all(dim=1)
        return same & (integers.sum(dim=1) % 4 == 0)

    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        whole = x.round()
        floor = x.floor()
        error = x.sub_(whole)
        size = error.abs()
        odd_whole = parity(whole.sum(dim=0))
        odd_half = parity(floor.sum(dim=0))
        # Squared distance of the half coset less that of the integer one, parity repairs included.
        gap = 2 - size.sum(dim=0)
        gap += odd_half * 2 * size.amin(dim=0)
        gap -= odd_whole * (1 - 2 * size.amax(dim=0))
        # 0 or 1 in place of a condition: products vectorise where a broadcast selection does not.
        half = (gap < 0).to(x.dtype)
        points = whole.addcmul_(floor.add_(0.5).sub_(whole), half)
        # Against a half-integer the error has the opposite sign and the worst |d| is the least.
        badness = size.sub_(half * 0.5).abs_()
        odd = odd_whole + half * (odd_half - odd_whole)
        return flip_worst(points, error.mul_(1 - 2 * half), badness, odd)
