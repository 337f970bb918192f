"""Weights, gradients and optimizer state, each in one flat buffer whose views are the tensors.

Clipping, the optimizer, the cast to the precision of the arithmetic and the check for non-finite
values are then single passes over memory. Every view begins on a 64-byte boundary in any precision of
two bytes or more; the padding between views is zero and stays zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

ALIGN = 32
"""Elements to whose multiple each view is padded: 64 bytes of a 2-byte type."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names, shapes and places of the tensors in a flat buffer."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of named tensors, in their order."""
        return cls(names=tuple(tensors), shapes=tuple(t.shape for t in tensors.values()))

    @property
    def padded(self) -> list[int]:
        """Elements that each tensor takes, its padding included."""
        return [-(-shape.numel() // ALIGN) * ALIGN for shape in self.shapes]

    @property
    def size(self) -> int:
        """Elements of the whole buffer."""
        return sum(self.padded)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The named tensors inside ``flat``; no copy."""
        parts = flat.split(self.padded)
        return {
            name: part[: shape.numel()].view(shape)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """A new flat buffer holding ``tensors``."""
        pieces = []
        for name, shape, size in zip(self.names, self.shapes, self.padded, strict=True):
            pieces.append(tensors[name].to(dtype).flatten())
            if size > shape.numel():
                pieces.append(tensors[name].new_zeros(size - shape.numel(), dtype=dtype))
        return torch.cat(pieces)


@dataclass(kw_only=True)
class Arena:
    """The flat buffers of one model in training.

    ``weights`` are the float32 masters; ``compute`` is their copy in the arithmetic's precision (the
    same buffer where that is float32); ``grad`` is the summed gradient; ``moments`` belong to the
    optimizer; ``decay`` is 1 where weight decay applies (matrices and tables) and 0 elsewhere.
    """

    layout: Layout
    weights: Tensor
    compute: Tensor
    grad: Tensor
    decay: Tensor
    moments: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def adopt(cls, model: nn.Module, dtype: torch.dtype, moments: tuple[str, ...]) -> Arena:
        """Move a model's parameters into an arena: they become views of ``weights``."""
        parameters = dict(model.named_parameters())
        layout = Layout.of(parameters)
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        master = next(iter(tensors.values())).dtype
        weights = layout.flatten(tensors, master)
        for name, view in layout.views(weights).items():
            parameters[name].data = view
        matrices = {n: torch.full_like(t, float(t.dim() > 1)) for n, t in tensors.items()}
        return cls(
            layout=layout,
            weights=weights,
            compute=weights if dtype == master else weights.to(dtype),
            grad=torch.zeros_like(weights),
            decay=layout.flatten(matrices, master),
            moments={name: torch.zeros_like(weights) for name in moments},
        )

    def refresh(self) -> None:
        """Make ``compute`` the present weights again, after they were changed from outside."""
        if self.compute is not self.weights:
            self.compute.copy_(self.weights)

    def named_moments(self) -> dict[str, dict[str, Tensor]]:
        """Optimizer state by moment and parameter name, as views."""
        return {moment: self.layout.views(flat) for moment, flat in self.moments.items()}

    def load(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Copy named weights and optimizer state in, whatever arrangement they were saved from."""
        for name, view in self.layout.views(self.weights).items():
            view.copy_(weights[name])
        for moment, views in self.named_moments().items():
            for name, view in views.items():
                view.copy_(moments[moment][name])
        self.refresh()
