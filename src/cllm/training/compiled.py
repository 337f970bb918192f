"""How a step's functions are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def perhaps_compiled(function: F, compiled: bool) -> F:
    """``function``, compiled for the shapes it is called with.

    Dynamo checks before each call that nothing the code was compiled for has changed; over a model's
    many attributes this takes a third of a millisecond. Here nothing can change but tensors: each step
    has compiled code of its own, and each function is called in one mode of the model only.
    """
    if not compiled:
        return function
    options = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    found = torch.compile(  # type: ignore[call-overload]
        function, dynamic=False, fullgraph=True, isolate_recompiles=True, options=options
    )
    return cast(F, found)
