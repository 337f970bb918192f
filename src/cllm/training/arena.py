"""Weights, gradients and optimizer state, each in one flat buffer whose views are the tensors.

The check for non-finite values with the norm is then one pass over the gradient, and clipping and the
optimizer are one more over all. Every view begins on a
64-byte boundary in any precision of two bytes or more; the padding between views is zero and stays zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from cllm.core.allocator import give_back_freed_memory
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


@dataclass(frozen=True, kw_only=True)
class Part:
    """What an optimizer updates alike: ``weights`` and their ``moments``, all of one shape. ``decays``:
    whether weight decay applies (matrices and tables). ``copy``: what becomes a low-precision copy of
    the weights, if there is one. ``first``: their place in the arena."""

    weights: Tensor
    moments: dict[str, Tensor]
    decays: bool = True
    copy: Tensor | None = None
    first: int = 0

    def of(self, flat: Tensor) -> Tensor:
        """This part of a buffer as large as the arena."""
        return flat[self.first : self.first + len(self.weights)]


@dataclass(kw_only=True)
class Arena:
    """The flat buffers of one model in training.

    ``weights`` are the float32 masters; ``compute`` is their copy in the arithmetic's precision (the
    same buffer where that is float32); ``grad`` is the summed gradient; ``moments`` belong to the
    optimizer.

    Matrices and tables come first, ``decaying`` elements of them, then vectors: what decays is one stretch
    of memory, and no mask of it need be read. The tables named ``by_rows`` come last. Of them a step uses
    some rows only, which are updated apart (``cllm.training.lazy_rows``): ``grad`` ends before them.
    """

    layout: Layout
    weights: Tensor
    compute: Tensor
    grad: Tensor
    moments: dict[str, Tensor]
    decaying: int
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

        ``memory``: where weights, their copy and the moments lie, if other processes share them; one
        that is not their ``owner`` takes them as they are there.
        """
        found = dict(model.named_parameters())
        dense = [name for name in found if name not in by_rows]
        matrices = [name for name in dense if found[name].dim() > 1]
        vectors = [name for name in dense if found[name].dim() <= 1]
        parameters = {name: found[name] for name in (*matrices, *vectors, *by_rows)}
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
        if memory is None:
            state = {name: torch.zeros_like(weights) for name in moments}
        else:  # zeros, where nobody wrote
            state = {name: memory.take(weights.shape, master) for name in moments}
        # The last that holds the parameters' own memory, in blocks too small for what follows.
        del tensors
        give_back_freed_memory()
        return cls(
            layout=layout,
            weights=weights,
            compute=compute,
            grad=weights.new_zeros(layout.first(len(dense)).size),
            moments=state,
            decaying=layout.first(len(matrices)).size,
            by_rows=by_rows,
        )

    @cached_property
    def dense_layout(self) -> Layout:
        """The layout of all but the tables ``by_rows``."""
        return self.layout.first(len(self.layout.names) - len(self.by_rows))

    @cached_property
    def dense_compute(self) -> Tensor:
        """``compute`` without the tables ``by_rows``."""
        return self.compute[: self.dense_layout.size] if self.by_rows else self.compute

    def parts(
        self, copy: Tensor | None = None, within: tuple[int, int] | None = None
    ) -> list[Part]:
        """All but the tables ``by_rows``, as views: what decays, then what does not.

        ``copy``: the buffer that becomes the copy of the weights; ``compute`` if that is one.
        ``within``: first and last of the elements that are wanted.
        """
        size = self.dense_layout.size
        begin, end = (0, size) if within is None else within
        if copy is None and self.compute is not self.weights:
            copy = self.compute
        middle = min(max(begin, self.decaying), end)
        ends = (begin, middle), (middle, min(end, size))
        return [
            Part(
                weights=self.weights[first:last],
                moments={name: flat[first:last] for name, flat in self.moments.items()},
                decays=first < self.decaying,
                copy=copy[first:last] if copy is not None else None,
                first=first,
            )
            for first, last in ends
            if first < last
        ]

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
