"""Weights, gradients and optimizer state, each in one flat buffer whose views are the tensors.

Clipping, the optimizer, the cast to the precision of the arithmetic and the check for non-finite
values are then single passes over memory. Every view begins on a 64-byte boundary in any precision of
two bytes or more; the padding between views is zero and stays zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from cllm.core.shared_memory import SharedMemory

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

    def first(self, count: int) -> Layout:
        """The layout of the first ``count`` tensors."""
        return Layout(names=self.names[:count], shapes=self.shapes[:count])

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
class Part:
    """What an optimizer updates: ``weights``, their ``moments``, and ``decay``, which is 1 where weight
    decay applies (matrices and tables) and 0 elsewhere. All of one shape, or broadcast to it."""

    weights: Tensor
    decay: Tensor
    moments: dict[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class Arena(Part):
    """The flat buffers of one model in training.

    ``weights`` are the float32 masters; ``compute`` is their copy in the arithmetic's precision (the
    same buffer where that is float32); ``grad`` is the summed gradient; ``moments`` belong to the
    optimizer.

    The tables named ``by_rows`` come last. Of them a step uses some rows only, which are updated apart
    (``cllm.training.lazy_rows``): ``grad`` and ``decay`` end before them, and ``dense`` is the rest.
    """

    layout: Layout
    compute: Tensor
    grad: Tensor
    by_rows: tuple[str, ...] = ()

    @classmethod
    def adopt(
        cls,
        model: nn.Module,
        dtype: torch.dtype,
        moments: tuple[str, ...],
        by_rows: tuple[str, ...] = (),
        memory: SharedMemory | None = None,
        owner: bool = True,
    ) -> Arena:
        """Move a model's parameters into an arena: they become views of ``weights``.

        ``memory``: where weights and their copy lie, if other processes share them; one that is not
        their ``owner`` takes the weights as they are there.
        """
        found = dict(model.named_parameters())
        parameters = {name: p for name, p in found.items() if name not in by_rows}
        parameters |= {name: found[name] for name in by_rows}
        layout = Layout.of(parameters)
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        master = next(iter(tensors.values())).dtype
        weights = layout.flatten(tensors, master)
        compute = weights if dtype == master else weights.to(dtype)
        if memory is not None:
            places = [memory.take(weights.shape, master)]
            if dtype != master:
                places.append(memory.take(weights.shape, dtype))
            if owner:
                places[0].copy_(weights)
                places[-1].copy_(compute)
            weights, compute = places[0], places[-1]
        for name, view in layout.views(weights).items():
            parameters[name].data = view
        dense = layout.first(len(layout.names) - len(by_rows))
        matrices = {
            n: torch.full_like(tensors[n], float(tensors[n].dim() > 1)) for n in dense.names
        }
        return cls(
            layout=layout,
            weights=weights,
            compute=compute,
            grad=weights.new_zeros(dense.size),
            decay=dense.flatten(matrices, master),
            moments={name: torch.zeros_like(weights) for name in moments},
            by_rows=by_rows,
        )

    @cached_property
    def dense_layout(self) -> Layout:
        """The layout of ``dense``."""
        return self.layout.first(len(self.layout.names) - len(self.by_rows))

    @cached_property
    def dense(self) -> Part:
        """All but the tables ``by_rows``, as views; the arena itself where there are none."""
        if not self.by_rows:
            return self
        size = self.dense_layout.size
        moments = {name: flat[:size] for name, flat in self.moments.items()}
        return Part(weights=self.weights[:size], decay=self.decay, moments=moments)

    @cached_property
    def dense_compute(self) -> Tensor:
        """``compute`` of ``dense``."""
        return self.compute[: self.dense_layout.size] if self.by_rows else self.compute

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
