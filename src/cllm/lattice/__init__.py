"""Lattices: reduction, closest and shortest vectors, root lattices, divisors and spirals.

Usable on its own: NumPy, SciPy and PyTorch, and fpylll where a basis is reduced or enumerated. Rows
are basis vectors; float64 unless the input says otherwise.
"""

from cllm.lattice.ball import coefficients_in_ball
from cllm.lattice.closest import Closest, closest
from cllm.lattice.codebook import Codebook
from cllm.lattice.curves import (
    golden,
    hilbert,
    hilbert_number,
    morton,
    morton_number,
)
from cllm.lattice.divisor import Codes, FactorCache, join, meet
from cllm.lattice.e8 import E8
from cllm.lattice.gso import gram_schmidt
from cllm.lattice.leech import Leech
from cllm.lattice.measures import (
    determinant,
    dual,
    gaussian_heuristic,
    mean_ratio_db,
    orthogonality_defect,
    profile,
    root_hermite_factor,
)
from cllm.lattice.primes import factor, is_prime, nth_prime, nth_primes, primes_below
from cllm.lattice.reduction import Reduction, reduce
from cllm.lattice.root import Dn, RootLattice, Zn
from cllm.lattice.shortest import Shortest, shortest
from cllm.lattice.similarity import gcd_over_max, similarity
from cllm.lattice.spiral_index import SpiralIndex
from cllm.lattice.ulam import ulam, ulam_number

__all__ = [
    "E8",
    "Closest",
    "Codebook",
    "Codes",
    "Dn",
    "FactorCache",
    "Leech",
    "Reduction",
    "RootLattice",
    "Shortest",
    "SpiralIndex",
    "Zn",
    "closest",
    "coefficients_in_ball",
    "determinant",
    "dual",
    "factor",
    "gaussian_heuristic",
    "gcd_over_max",
    "golden",
    "gram_schmidt",
    "hilbert",
    "hilbert_number",
    "is_prime",
    "join",
    "mean_ratio_db",
    "meet",
    "morton",
    "morton_number",
    "nth_prime",
    "nth_primes",
    "orthogonality_defect",
    "primes_below",
    "profile",
    "reduce",
    "root_hermite_factor",
    "shortest",
    "similarity",
    "ulam",
    "ulam_number",
]
