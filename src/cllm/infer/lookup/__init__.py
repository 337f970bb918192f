"""Closest tokens: an index of a token table in lattice cells, with exact and approximate answers."""

from cllm.infer.lookup.index import TokenIndex
from cllm.infer.lookup.metric import Nearest

__all__ = ["Nearest", "TokenIndex"]
