"""Token tables of which a step reads, differentiates and updates only the rows that it uses.

A step on the exact loss of a tied table uses every row. One that only looks tokens up, or scores against
candidates, uses few: their gradient is then (rows, r) and not (V, r), and weights and moments of the
others are not touched; not a bit of them changes.

**Idle rows.** Without a gradient AdamW still decays a weight, fades its moments, and moves it along the
mean for some ten steps. Leaving that out, as sparse variants of Adam do, is another algorithm: the first
moment either never fades, or a rare token loses nine tenths of each gradient. Here a row that is used
after k idle steps first gets what it has missed, in closed form (``cllm.training.idle``), before it is
read. So training by rows is the dense training, up to rounding and AdamW's ``eps`` (see
``cllm.training.optimizer.AdamW.direction``), and which of the two runs is a question of speed alone.

Between steps the arena therefore holds idle rows as they were last used. Who reads the model then does so
within ``settled``. A checkpoint holds the settled table, and beside it what is needed to go on with the
same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cllm.core.config import TrainConfig
from cllm.model.cross_entropy import IGNORE
from cllm.model.embedding import Embedding
from cllm.model.incidence import Bags
from cllm.training.arena import Arena, Part
from cllm.training.gradient import INPUT, Gradients, Micro
from cllm.training.idle import IdleClock
from cllm.training.optimizer import Optimizer


def idling_tables(train: TrainConfig, tied: bool) -> tuple[str, ...]:
    """Names of the weights that are updated by rows; ``tied``: one table is input and output."""
    if train.lazy_rows != "on":
        return ()
    # The exact loss scores with every row of a head.
    head_idles = not tied and train.loss == "sampled"
    return ("embedding.weight", "head.weight") if head_idles else ("embedding.weight",)


@dataclass(frozen=True, eq=False)
class InUse:
    """What a step uses of a table.

    ``rows`` (p,): of the weight, ascending, each once; ``part``: copies of these and of their moments, up
    to date; ``tokens``: how many tokens use them; ``bags``: which rows each of these is the sum of.
    """

    rows: Tensor
    part: Part
    tokens: int
    bags: Bags | None


class LazyRows:
    """The tables of a model that are updated by rows, with the state that this takes.

    ``tables``: their names. ``touched``: for each row of the weight, the count of steps up to which it
    is up to date.
    """

    def __init__(self, gradients: Gradients, optimizer: Optimizer) -> None:
        self.arena: Arena = gradients.arena
        self.gradients, self.optimizer = gradients, optimizer
        self.tables = tuple(name.removesuffix(".weight") for name in self.arena.by_rows)
        self.clock = IdleClock(optimizer)
        masters = self.arena.layout.views(self.arena.weights)
        moments = self.arena.named_moments()
        keys = dict(zip(self.tables, self.arena.by_rows, strict=True))
        self._weights = {name: masters[key] for name, key in keys.items()}
        self._moments = {
            name: {moment: views[key] for moment, views in moments.items()}
            for name, key in keys.items()
        }
        copies = self.arena.layout.views(self.arena.compute)
        self._compute = {name: copies[key] for name, key in keys.items()}
        self._basis = {name: masters.get(f"{name}.basis") for name in self.tables}
        self.touched = {
            name: torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
            for name, weight in self._weights.items()
        }
        self._settled = False
        self.is_torn = False
        """Whether some rows are brought up to date, and others are not."""

    # A step: what it uses, then what becomes of that.

    def begin(
        self, micros: Sequence[Micro]
    ) -> tuple[list[Micro], dict[str, Tensor], dict[str, InUse]]:
        """The micro-batches with ids that are places in the cores, those cores (R, r), and what is in use.

        R is the same in every step (compiled code is made for it): as many as there could be; places
        that no token has hold zeros.
        """
        changed, cores, used = list(micros), {}, {}
        for name in self.tables:
            ids = [part for micro in micros for part in _ids_of(micro, name, self._roles(name))]
            tokens, places = torch.unique(
                torch.cat([p.flatten() for p in ids]), return_inverse=True
            )
            split = iter(places.split([part.numel() for part in ids]))
            changed = [_replaced(micro, self._roles(name), split) for micro in changed]
            used[name] = self._use(name, tokens)
            core = self._core(self._table(name), used[name], self._basis[name])
            size = min(len(places), self._vocabulary(name))
            whole = core.new_zeros((size, core.shape[1]), dtype=self.arena.compute.dtype)
            whole[: len(core)] = core
            cores[name] = whole
        return changed, cores, used

    def pull(self, used: dict[str, InUse], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the weight's rows in use from those of the cores."""
        made = {}
        for name, use in used.items():
            grad = grads[name][: use.tokens]
            made[name] = grad if use.bags is None else use.bags.transposed().sums(grad)
        return made

    def apply(
        self,
        used: dict[str, InUse],
        grads: dict[str, Tensor],
        factor: float,
        lr: float,
        count: int,
    ) -> None:
        """Update the rows in use with ``factor`` times their gradients, in applied step ``count`` (from 1)
        at ``lr``."""
        self.clock.advance(lr)
        for name, use in used.items():
            self.optimizer.update(use.part, grads[name], factor, lr, count)
            self._weights[name].index_copy_(0, use.rows, use.part.weights)
            for moment, kept in self._moments[name].items():
                kept.index_copy_(0, use.rows, use.part.moments[moment])
            self.touched[name][use.rows] = self.clock.count

    # Outside a step: the tables as they are.

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Within it, all rows are up to date for those who read the model; after it, all is as before."""
        if self._settled:
            yield
            return
        before = {name: weight.clone() for name, weight in self._weights.items()}
        self.is_torn = True
        for name in self.tables:
            weights, _ = self._caught_up(name)
            self._weights[name].copy_(weights)
        self._settled = True
        self.refresh_copies()
        self.is_torn = False
        try:
            yield
        finally:
            self.is_torn = True
            self._settled = False
            for name, kept in before.items():
                self._weights[name].copy_(kept)
            self.is_torn = False

    def settle(self) -> None:
        """Bring all rows up to date, for good."""
        for name in self.tables:
            weights, moments = self._caught_up(name)
            self._weights[name].copy_(weights)
            for moment, kept in self._moments[name].items():
                kept.copy_(moments[moment])
            self.touched[name].fill_(self.clock.count)
        self.refresh_copies()

    def take_as_settled(self, count: int) -> None:
        """Take what the arena holds after ``count`` applied steps for up to date."""
        self.clock.restart(count)
        for name in self.tables:
            self.touched[name].fill_(count)

    def refresh_copies(self) -> None:
        """Make low-precision copies and computed cores those of the present weights."""
        for name in self.tables:
            if self.arena.compute is not self.arena.weights:
                self._compute[name].copy_(self._weights[name])
            self._table(name).after_step()
        self.gradients.compute_cores(tuple(n for n in self.tables if n in self.gradients.cores))

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the settled weights lacks to go on with the same bits."""
        assert not self._settled, "within `settled` the weights are not those to go on with"
        return {
            "clock": self.clock.state(),
            "weights": {name: weight.clone() for name, weight in self._weights.items()},
            "touched": {name: at.clone() for name, at in self.touched.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of ``state``, for those tables that it has; the moments are in the arena already."""
        self.clock.load(state["clock"])
        for name in set(self.tables) & set(state["touched"]):
            self._weights[name].copy_(state["weights"][name])
            self.touched[name].copy_(state["touched"][name])

    def _table(self, name: str) -> Embedding:
        return self.gradients.tables[name]

    def _vocabulary(self, name: str) -> int:
        incidence = self._table(name).incidence
        return len(self._weights[name]) if incidence is None else incidence.tokens

    def _roles(self, name: str) -> tuple[bool, bool]:
        """Whether the table is input, and whether it is output."""
        return name == INPUT, name == self.gradients.output

    def _use(self, name: str, tokens: Tensor) -> InUse:
        incidence = self._table(name).incidence
        rows, bags = (tokens, None) if incidence is None else incidence.bags(tokens)
        weights, moments = self.clock.catch_up(
            self._weights[name][rows],
            {moment: kept[rows] for moment, kept in self._moments[name].items()},
            self.touched[name][rows],
        )
        part = Part(weights=weights, moments=moments)
        return InUse(rows=rows, part=part, tokens=len(tokens), bags=bags)

    def _core(self, table: Embedding, use: InUse, basis: Tensor | None) -> Tensor:
        rows = use.part.weights
        core = rows if use.bags is None else use.bags.sums(rows)
        return core if table.snap is None else table.snap(core, basis)

    def _caught_up(self, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        return self.clock.catch_up(self._weights[name], self._moments[name], self.touched[name])


def restore_idle(
    arena: Arena, optimizer: Optimizer, lazy: LazyRows | None, state: dict[str, Any]
) -> None:
    """Go on from a checkpoint whose idle rows are in ``state``.

    A table that is updated as a whole from now on has its settled weights from the checkpoint; its moments
    get what they have missed.
    """
    if lazy is not None:
        lazy.load(state)
    clock = IdleClock(optimizer)
    clock.load(state["clock"])
    views = arena.named_moments()
    for name in set(state["touched"]) - set(lazy.tables if lazy is not None else ()):
        moments = {moment: found[f"{name}.weight"] for moment, found in views.items()}
        _, faded = clock.catch_up(state["weights"][name], moments, state["touched"][name])
        for moment, kept in moments.items():
            kept.copy_(faded[moment])


def _ids_of(micro: Micro, name: str, roles: tuple[bool, bool]) -> list[Tensor]:
    """Ids that a table is asked for, in the order in which ``_replaced`` puts places in their stead."""
    is_input, is_output = roles
    found = []
    if is_input:
        found.append(micro.ids)
        if micro.pairs is not None:
            found.append(micro.pairs.ids)
    if is_output:
        assert micro.candidates is not None, "the exact loss uses every row"
        # A target that is not scored needs no row; an id that is in use anyway stands for it.
        found += [_scored(micro), micro.candidates.ids]
    return found


def _replaced(micro: Micro, roles: tuple[bool, bool], places: Iterator[Tensor]) -> Micro:
    is_input, is_output = roles
    if is_input:
        micro = micro._replace(ids=next(places).view_as(micro.ids))
        if micro.pairs is not None:
            ids = next(places).view_as(micro.pairs.ids)
            micro = micro._replace(pairs=micro.pairs._replace(ids=ids))
    if is_output:
        assert micro.candidates is not None
        targets = next(places).view_as(micro.targets)
        targets = torch.where(micro.targets == IGNORE, IGNORE, targets)
        candidates = micro.candidates._replace(ids=next(places))
        micro = micro._replace(targets=targets, candidates=candidates)
    return micro


def _scored(micro: Micro) -> Tensor:
    assert micro.candidates is not None
    return torch.where(micro.targets == IGNORE, micro.candidates.ids[0], micro.targets)
