"""The kernels of this floor are compiled by ``cllm.native``, which lies below."""

from cllm.native import CannotCompileError, Library

__all__ = ["CannotCompileError", "Library"]
