"""Operators of our own, which Inductor does not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "cllm"


def operator(schema: str) -> Callable[[Callable[..., Tensor]], Any]:
    """Make a function the operator of ``schema`` ("name(Tensor x, …) -> Tensor"), which has no gradient
    and changes no argument.

    ``torch.library.custom_op`` would do, but its operators import Dynamo when they are first called, also
    where nothing is compiled: three seconds of a process that trains for one.
    """

    def made(function: Callable[..., Tensor]) -> Any:
        name, _, signature = schema.partition("(")
        torch.library.define(f"{NAMESPACE}::{name}", f"({signature}")
        torch.library.impl(f"{NAMESPACE}::{name}", "default", function)
        return getattr(torch.ops.cllm, name).default

    return made


def fake(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Say of what shape and type an operator's result is."""
    registered: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = (
        torch.library.register_fake(f"{NAMESPACE}::{name}")
    )
    return registered
