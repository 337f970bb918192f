"""Codes of tokens in a file: safetensors, written whole, read without unpickling anything."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from cllm.core.atomic import new_file
from cllm.lattice.divisor import Codes
from cllm.text.token_codes import TokenCodes

FORMAT = "cllm-token-codes-2"


def save_codes(codes: TokenCodes, path: str | Path) -> None:
    """Write ``codes``, atomically. Raises ``UserError`` where the place cannot be written."""
    from safetensors.numpy import save

    arrays = {
        "offsets": codes.codes.offsets,
        "factors": codes.codes.primes,
        "exponents": codes.codes.exponents,
        "primes": codes.primes,
        "kinds": codes.kinds,
    }
    if codes.counts is not None:
        arrays["counts"] = codes.counts
    facts = {
        "format": FORMAT,
        "tokenizer_sha256": codes.tokenizer_sha256,
        "labels": json.dumps(codes.labels),
    }
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    facts["checksum"] = _checksum(arrays, facts)
    with new_file(Path(path)) as file:
        file.write(save(arrays, metadata=facts))


def _checksum(arrays: dict[str, np.ndarray], facts: dict[str, str]) -> str:
    """SHA-256 of the labels, and of each array's name, type, shape and bytes."""
    digest = hashlib.sha256(facts.get("labels", "").encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def load_codes(path: str | Path, tokenizer_sha256: str) -> TokenCodes:
    """Read what ``save_codes`` wrote, for the tokenizer with that ``MergeTree.sha256``.

    Raises:
        ValueError: no such file, not one of codes, damaged, or made for another tokenizer.
    """
    from safetensors import SafetensorError, safe_open

    again = "build the codes anew from the tokenizer"
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read token codes from {path} ({error}); {again}") from error
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path} holds no token codes of this version; {again}")
    made_for = facts.get("tokenizer_sha256", "")
    if made_for != tokenizer_sha256:
        raise ValueError(
            f"{path} was made for another tokenizer ({made_for[:12]}…, not {tokenizer_sha256[:12]}…); "
            f"{again}"
        )
    if facts.get("checksum") != _checksum(arrays, facts):
        raise ValueError(
            f"the token codes in {path} are damaged: their checksum is another; {again}"
        )
    return TokenCodes(
        codes=Codes(arrays["offsets"], arrays["factors"], arrays["exponents"]),
        primes=arrays["primes"],
        kinds=arrays["kinds"],
        labels=tuple(json.loads(facts["labels"])),
        counts=arrays.get("counts"),
        tokenizer_sha256=tokenizer_sha256,
    )
