"""Forward and backward over the arena's buffers: the gradient of one micro-batch, and the loss alone.

A table is looked into, and scored with, through a core (see ``cllm.model.embedding``): the whole (V, r), or
those of its rows that the step uses. Ids are places in the core that is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm.model.cross_entropy import cross_entropy_sum, linear_cross_entropy
from cllm.model.embedding import add_rows
from cllm.model.norms import BatchNorm, Statistics, wide
from cllm.model.sampled_softmax import sampled_cross_entropy
from cllm.model.transformer import Transformer
from cllm.training.arena import Arena
from cllm.training.similarity import pair_loss
from cllm.training.vjp import vjp

INPUT = "embedding"


class Candidates(NamedTuple):
    """What sampled softmax scores a target against: ids (C,) and logs of their expected counts (C,)."""

    ids: Tensor
    log_expected: Tensor


class Pairs(NamedTuple):
    """What the similarity loss pulls together: ids (2, M), their similarities (M,), and the factor (scalar)
    of the loss's gradient."""

    ids: Tensor
    similarities: Tensor
    factor: Tensor


class Micro(NamedTuple):
    """A micro-batch: ids and targets (B, T), and what was drawn for it."""

    ids: Tensor
    targets: Tensor
    candidates: Candidates | None = None
    pairs: Pairs | None = None


class Gradient(NamedTuple):
    """What a micro-batch gives: the summed loss, the similarity loss, the flat gradient of the dense part,
    and for tables updated by rows the gradient of the given core."""

    loss: Tensor
    similarity: Tensor | None
    flat: Tensor
    rows: dict[str, Tensor]


class Listener(Protocol):
    """Who wants gradients as soon as they are known (in eager code only)."""

    def begin(self, loss: Tensor) -> None:
        """The summed loss, before anything of its gradient."""

    def known(self, name: str, grad: Tensor) -> None:
        """The gradient of a parameter of the trunk, which nothing reads any more in this backward pass."""


class _Trunk(nn.Module):
    """The model between the cores of its two tables, for ``functional_call``."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, coordinates_btr: Tensor, statistics: Statistics) -> Tensor:
        vectors_btd = self.model.embedding.expand(coordinates_btr)
        return self.model.output.contract(self.model.trunk(vectors_btd, statistics=statistics))


class Gradients:
    """Losses and gradients of a model in an arena.

    ``cores`` holds, by table, the whole cores that are computed rather than learned. ``chunk``: rows of
    the exact head computed at a time, 0 for all.
    """

    def __init__(self, model: Transformer, arena: Arena, chunk: int) -> None:
        self.model, self.arena, self.chunk = model, arena, chunk
        self.layout, self.compute = arena.dense_layout, arena.dense_compute
        self.tables, self.output = model.tables, model.output_name
        self.cores = {
            name: table.core().detach().to(arena.compute.dtype, copy=True)
            for name, table in self.tables.items()
            if table.computes_core
        }
        self.trunk = _Trunk(model)
        self._norms = {m.name: m for m in model.modules() if isinstance(m, BatchNorm)}

    def compute_cores(self, names: tuple[str, ...]) -> None:
        """Pieces summed and coordinates snapped, once for all that an optimizer step reads of them."""
        masters = self.arena.layout.views(self.arena.weights)
        for name in names:
            weight, basis = masters[f"{name}.weight"], masters.get(f"{name}.basis")
            self.cores[name].copy_(self.tables[name].core_of(weight, basis))

    def summed_loss(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """The exact loss of a batch in nats, whatever it is trained on."""
        parameters = _named(self.arena.layout.views(self.arena.compute))
        coordinates = functional.embedding(ids_bt, self._core(INPUT, parameters, {}))
        hidden = torch.func.functional_call(self.trunk, parameters, (coordinates, []))
        core = self._core(self.output, parameters, {})
        return cross_entropy_sum(hidden.flatten(0, 1), core, targets_bt.flatten(), self.chunk)

    def backward(self, micro: Micro, scale: Tensor, rows: Mapping[str, Tensor]) -> Gradient:
        """Summed loss, and the gradients of ``scale`` times it.

        ``rows``: cores of tables that are updated by rows, of the rows in use.
        """
        loss, similarity, named, cores = self.by_name(micro, scale, rows)
        flat = self.layout.flatten(named, self.arena.weights.dtype)
        return Gradient(loss, similarity, flat, {name: cores[name] for name in rows})

    def by_name(
        self,
        micro: Micro,
        scale: Tensor,
        rows: Mapping[str, Tensor],
        listener: Listener | None = None,
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor], dict[str, Tensor]]:
        """Summed loss, similarity loss, and the gradients by parameter and by core.

        The ``listener`` hears of those of layers and norms while the layers below have theirs to come;
        those of tables and their bases are complete at the end only.
        """

        def trunk(
            parameters: dict[str, Tensor], coordinates: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]:
            statistics: Statistics = []
            if listener is not None:
                for prefixed, parameter in parameters.items():
                    name = prefixed.removeprefix("model.")
                    if name.partition(".")[0] not in self.tables:
                        parameter.register_hook(partial(listener.known, name))
            hidden = torch.func.functional_call(self.trunk, parameters, (coordinates, statistics))
            return hidden.flatten(0, 1), dict(statistics)  # vjp takes names as keys only

        parameters = _named(self.layout.views(self.compute))
        core = self._core(INPUT, parameters, rows)
        coordinates = functional.embedding(micro.ids, core)
        hidden, pull, statistics = vjp(trunk, parameters, coordinates)
        scoring = self._core(self.output, parameters, rows)
        loss, hidden_grad, scoring_grad = self._head(hidden, scoring, micro, scale)
        if listener is not None:
            listener.begin(loss)
        # The cores' gradients are added here rather than by autograd, each in a fixed order.
        with torch.no_grad():  # else autograd prepares for second derivatives, at a cost
            grads, coordinates_grad = pull(hidden_grad)
        looked_up = add_rows(
            wide(coordinates_grad.flatten(0, 1)), micro.ids.flatten(), core.shape[0]
        )
        cores = {self.output: scoring_grad}
        cores[INPUT] = looked_up + scoring_grad if self.output == INPUT else looked_up
        similarity = None
        if micro.pairs is not None:
            similarity = self._pull_together(micro.pairs, core, parameters, cores, grads)
        for name, grad in cores.items():
            if name not in rows:
                grads[f"model.{name}.weight"] = self.tables[name].pull(grad)
        self._observe(statistics)
        named = {name.removeprefix("model."): grad for name, grad in grads.items()}
        return loss, similarity, named, cores

    def _head(
        self, hidden: Tensor, scoring: Tensor, micro: Micro, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        targets = micro.targets.flatten()
        if micro.candidates is None:
            return linear_cross_entropy(hidden, scoring, targets, scale, self.chunk)
        return sampled_cross_entropy(hidden, scoring, targets, *micro.candidates, scale)

    def _pull_together(
        self,
        pairs: Pairs,
        core: Tensor,
        parameters: Mapping[str, Tensor],
        cores: dict[str, Tensor],
        grads: dict[str, Tensor],
    ) -> Tensor:
        """The similarity loss on the input's table; its gradients are added to ``cores`` and ``grads``."""
        name = f"model.{INPUT}.basis"
        basis = parameters.get(name)

        def loss(rows: Tensor, *basis: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return pair_loss(rows, basis[0] if basis else None, pairs.similarities), {}

        inputs = (core[pairs.ids],) if basis is None else (core[pairs.ids], basis)
        value, pull, _ = vjp(loss, *inputs)
        rows_grad, *basis_grad = pull(pairs.factor)
        added = add_rows(wide(rows_grad.flatten(0, 1)), pairs.ids.flatten(), core.shape[0])
        cores[INPUT] = cores[INPUT] + added
        if basis is not None:
            grads[name] = grads[name] + basis_grad[0]
        return value

    def _core(
        self, name: str, parameters: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> Tensor:
        """The core of a table, in the arithmetic's precision."""
        if name in rows:
            return rows[name]
        return self.cores[name] if name in self.cores else parameters[f"model.{name}.weight"]

    def _observe(self, statistics: Mapping[str, Tensor]) -> None:
        """Move batch norm's running averages towards what this batch showed."""
        for name, value in statistics.items():
            module, _, buffer = name.rpartition(".")
            running = getattr(self._norms[module], buffer)
            running.add_((value - running) * BatchNorm.momentum)


def _named(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": view for name, view in views.items()}
