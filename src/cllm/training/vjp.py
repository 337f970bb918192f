"""Vector-Jacobian products, in compiled code and in code that runs as it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Pull = Callable[[Tensor], tuple[Any, ...]]
"""The output's gradient to those of the inputs, in their structure; zeros where nothing depends."""


def vjp(function: Callable[..., tuple[Tensor, Any]], *inputs: Any) -> tuple[Tensor, Pull, Any]:
    """The output of ``function``, its pull, and what else it gives, at ``inputs`` (trees of tensors).

    That is ``torch.func.vjp`` with ``has_aux``, and in compiled code it is called, since Dynamo traces it.
    Elsewhere it would import Dynamo, and with it seconds of a process that compiles nothing; there the
    tape of autograd is asked itself.
    """
    if torch.compiler.is_compiling():
        made: tuple[Tensor, Pull, Any] = cast(Any, torch.func.vjp)(function, *inputs, has_aux=True)
        return made
    leaves, structure = pytree.tree_flatten(inputs)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        output, rest = function(*pytree.tree_unflatten(leaves, structure))

    def pull(gradient: Tensor) -> tuple[Any, ...]:
        # A sum whose gradient in the output is ``gradient`` to the bit: given as such, it would have torch
        # import its symbolic shapes.
        with torch.enable_grad():
            total = (output * gradient).sum()
        found = torch.autograd.grad(total, leaves, materialize_grads=True)
        pulled: tuple[Any, ...] = pytree.tree_unflatten(list(found), structure)
        return pulled

    return output.detach(), pull, pytree.tree_map(torch.detach, rest)
