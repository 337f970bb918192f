"""A token table placed by the tokens' codes, without a look at which token stands beside which.

Each piece of a code is a prime, the more frequent the smaller, and a direction: in each plane of two
coordinates a place on the golden spiral. Tokens that share pieces begin near each other. It is there to
be compared with; ``docs/model.md`` has what the comparison gave.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from cllm.lattice import golden, nth_primes
from cllm.text.token_codes import TokenCodes


def crystal_table(codes: TokenCodes, vocab_size: int, width: int, *, std: float) -> np.ndarray:
    """A (``vocab_size``, ``width``) float32 table whose entries have root mean square ``std``.

    Row v is Σ_p e_vp · log(p) · direction of p over the primes p of the token's code with their exponents
    e_vp. In plane i, the n-th prime has the angle of point n·(i-th prime) of the golden spiral (Vogel
    1979), so that the directions of any two primes are nearly orthogonal. Rows that the tokenizer does not
    have get a prime each, beyond those of the codes.
    """
    rest, known = vocab_size - len(codes), len(codes.primes)
    exponents = sparse.block_diag([codes.exponents(), sparse.eye_array(rest)], format="csr")
    primes = np.concatenate([codes.primes, nth_primes(known + rest)[known:]])
    rank = np.empty(len(primes), dtype=np.int64)
    rank[np.argsort(primes)] = np.arange(1, len(primes) + 1)
    planes = -(-width // 2)
    x, y = golden(rank[:, None] * nth_primes(planes)[None, :])
    directions = np.stack([x, y], axis=-1) / np.hypot(x, y)[..., None]
    table = exponents @ (np.log(primes)[:, None] * directions.reshape(len(primes), -1)[:, :width])
    return (table * (std / np.sqrt(np.mean(table**2)))).astype(np.float32)
