"""How alike codes are in the divisor lattice."""

from __future__ import annotations

import math

import numpy as np

from cllm.lattice.divisor import Codes

# Logarithms are rounded to multiples of 2^-40: sums below 2^13 are then exact in float64, whatever
# their order, so similarity is symmetric to the last bit and exactly 1 on the diagonal.
_FRACTION_BITS = 40
_SUM_BITS = 53

# A factor shared by this share of the codes is cheaper as a column of a dense product.
_DENSE_SHARE = 1 / 16


def similarity(a: Codes, b: Codes | None = None) -> np.ndarray:
    """log gcd / log lcm of all pairs: (len(a), len(b)) float64 in [0, 1]; b defaults to a.

    An information-weighted Jaccard index: 1 only for equal codes, 0 for coprime ones; of two codes
    1 it is 1. Logarithms are taken of the primes, in steps of 2^-40.

    Raises:
        ValueError: a code's logarithm is beyond 2^13 (a number of over 3500 digits).
    """
    b = a if b is None else b
    log_a, log_b = log_values(a), log_values(b)
    shared = _shared(a, b)
    union = np.add.outer(log_a, log_b)
    union -= shared
    empty = union == 0
    shared[empty] = 1
    union[empty] = 1
    np.divide(shared, union, out=shared)
    return shared


def gcd_over_max(a: Codes, b: Codes | None = None) -> np.ndarray:
    """gcd / max of all pairs, the older system's measure: (len(a), len(b)) float64 in (0, 1].

    Computed as exp(log gcd - log max), so that codes beyond float64 give their true ratio.
    """
    b = a if b is None else b
    shared = _shared(a, b)
    shared -= np.maximum.outer(log_values(a), log_values(b))
    return np.exp(shared, out=shared)


def log_values(codes: Codes) -> np.ndarray:
    """Natural logarithms of the codes (count,), in steps of 2^-40."""
    weights = codes.exponents * _log_primes(codes.primes)
    total = np.bincount(codes.rows(), weights=weights, minlength=len(codes)).astype(np.float64)
    if len(total) and total.max() >= 2.0 ** (_SUM_BITS - _FRACTION_BITS):
        row = int(total.argmax())
        raise ValueError(f"code {row} of {len(codes)} is too large: its logarithm is {total[row]}")
    return total


def _log_primes(primes: np.ndarray) -> np.ndarray:
    return np.ldexp(np.rint(np.ldexp(np.log(primes), _FRACTION_BITS)), -_FRACTION_BITS)


def _shared(a: Codes, b: Codes) -> np.ndarray:
    """log gcd of all pairs.

    A factor p^e stands as e features (p, 1), ..., (p, e), each worth log p: the gcd is what two
    codes share. Features that many codes have go through a dense product, the rest through a sparse
    one, whose work is the number of pairs that share a feature.
    """
    from scipy.sparse import csr_matrix

    primes_a, levels_a, rows_a = _features(a)
    primes_b, levels_b, rows_b = _features(b)
    primes, number = np.unique(np.concatenate([primes_a, primes_b]), return_inverse=True)
    levels = np.concatenate([levels_a, levels_b])
    height = int(levels.max(initial=0)) + 1
    # One integer a feature: sorting pairs would take most of the time.
    keys, column = np.unique(number.ravel() * height + levels, return_inverse=True)
    column = column.ravel()
    column_a, column_b = column[: len(rows_a)], column[len(rows_a) :]
    weight = _log_primes(primes[keys // height])
    in_a = np.bincount(column_a, minlength=len(keys))
    in_b = np.bincount(column_b, minlength=len(keys))
    common = (in_a > _DENSE_SHARE * len(a)) & (in_b > _DENSE_SHARE * len(b))

    def matrix(rows: np.ndarray, columns: np.ndarray, count: int) -> csr_matrix:
        data = (np.ones(len(rows)), (rows, columns))
        return csr_matrix(data, shape=(count, len(keys)))

    A, B = matrix(rows_a, column_a, len(a)), matrix(rows_b, column_b, len(b))
    dense = A[:, common].toarray() * weight[common] @ B[:, common].toarray().T
    rare = A[:, ~common].multiply(weight[~common]).tocsr() @ B[:, ~common].T.tocsr()
    _add_sparse(dense, rare)
    return dense


def _features(codes: Codes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prime and level of every unit of every exponent, and the code it belongs to."""
    primes = np.repeat(codes.primes, codes.exponents)
    ends = np.cumsum(codes.exponents)
    level = np.arange(len(primes)) - np.repeat(ends - codes.exponents, codes.exponents)
    return primes, level, np.repeat(codes.rows(), codes.exponents)


def _add_sparse(dense: np.ndarray, rare: object) -> None:
    coo = rare.tocoo()  # type: ignore[attr-defined]
    dense[coo.row, coo.col] += coo.data


def bits(codes: Codes) -> np.ndarray:
    """Information of the codes in bits, log2 of their values (count,)."""
    return log_values(codes) / math.log(2)
