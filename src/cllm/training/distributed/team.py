"""The first process's side of a group: what the trainer asks of it, all others do at the same time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from cllm.core.allocator import keep_freed_memory
from cllm.core.config import Config
from cllm.core.errors import UserError
from cllm.core.torchrun import leave
from cllm.training.distributed.group import Group, Kind, LostProcessError, Order
from cllm.training.distributed.member import Member, Writer
from cllm.training.distributed.strategies import make_member
from cllm.training.figures import Numbers

if TYPE_CHECKING:
    from cllm.training.figures import Figures
    from cllm.training.step import TrainStep

_SEED_STRIDE = 7_919


class Team:
    """All processes of a group as the ``TrainStep`` of the first sees them."""

    def __init__(self, group: Group, member: Member, own: TrainStep) -> None:
        self.group, self.member, self.own = group, member, own
        self._gathered = False

    @classmethod
    def assemble(cls, group: Group, config: Config, step: TrainStep) -> Team:
        """Have the others build what the first has built; its ``step`` is that of all from now on."""
        double = torch.get_default_dtype() == torch.float64
        group.brief({"config": config.model_dump(mode="json"), "double": double})
        with group.watching():
            team = cls(group, make_member(config, group.size, step), step)
        step.team = team
        step.refresh()
        return team

    def step(self, batches: Sequence[tuple[Tensor, Tensor]], numbers: Numbers) -> Figures:
        """Gradient and update of all; see ``TrainStep``."""
        self._gathered = False
        windows = self.member.step_windows(list(batches))
        seed = torch.initial_seed() % 2**62
        self.group.tell(Order(Kind.STEP, tuple(numbers), seed, tuple(windows[0].shape)))
        mine = self.group.hand_out(windows)
        return self._all(lambda: self.member.step(mine, numbers))

    def evaluate(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """The summed loss of a batch."""
        if not self.member.scores:
            self.gather()
            return self.own.evaluate_here(ids_bt, targets_bt)
        windows = self.member.evaluation_windows(ids_bt, targets_bt)
        self.group.tell(Order(Kind.EVALUATE, shape=tuple(windows[0].shape)))
        mine = self.group.hand_out(windows)
        return self._all(lambda: self.member.evaluate(mine))

    def load(self) -> None:
        """All take the first's weights and state."""
        self.group.tell(Order(Kind.LOAD))
        self._all(self.member.load)
        self._gathered = True

    def gather(self) -> None:
        """The first has all weights and state in its arena."""
        if not self._gathered:
            self.group.tell(Order(Kind.GATHER))
            self._all(self.member.gather)
            self._gathered = True

    @property
    def writes_together(self) -> bool:
        """Whether a checkpoint is written by all."""
        return isinstance(self.member, Writer)

    def save(self, directory: Path) -> None:
        """Each process writes its share into ``directory``, which all must see.

        Raises ``UserError`` if one does not.
        """
        self.group.tell(Order(Kind.SAVE))
        save(self.group, self.member, directory)

    def close(self) -> None:
        """Let the others end."""
        self.group.close()

    def leave(self, error: UserError) -> NoReturn:
        """End this process in the middle of what all do, which ends the others; it alone says why."""
        if self.group.claim():
            print(f"cllm: {error}", file=sys.stderr)
        leave(error.exit_code)

    def _all(self, work: Any) -> Any:
        with self.group.watching():
            return work()


def save(group: Group, member: Member, directory: Path | None) -> None:
    """What all do to write a checkpoint; the first knows where."""
    place = Path(group.share_json(str(directory)))
    if not group.all_agree(place.is_dir()):
        raise UserError(
            f"{place.parent.parent} is not seen by every machine: with train.parallel.strategy=fsdp each "
            "writes its share of a checkpoint, so --out must be on a file system that they share"
        )
    assert isinstance(member, Writer)
    with group.watching():
        member.save(place)


def serve(group: Group) -> None:
    """Any other process: do what the first orders until it says stop.

    Raises ``LostProcessError`` if a process is gone.
    """
    member = enlist(group)
    while member is not None and obey(group, member):
        pass


def enlist(group: Group) -> Member | None:
    """Another process's part in what the first is about to train; ``None`` if that is nothing."""
    facts = group.brief()
    if facts is None:
        return None
    if facts["double"]:
        torch.set_default_dtype(torch.float64)
    config = Config.model_validate(facts["config"])
    assert isinstance(config.train.threads, int)
    torch.set_num_threads(config.train.threads)
    keep_freed_memory()
    with group.watching():
        return make_member(config, group.size, None)


def obey(group: Group, member: Member) -> bool:
    """Wait for the first's next order and do it; whether there may be another."""
    order = group.hear()
    try:
        with group.watching():
            _do(order, group, member)
    except LostProcessError:
        raise
    except UserError:
        pass  # the first has the same, and says so
    return order.kind != Kind.STOP


def _do(order: Order, group: Group, member: Member) -> None:
    if order.kind == Kind.STEP:
        torch.manual_seed(order.seed + _SEED_STRIDE * group.rank)
        member.step(group.take(order.shape), _numbers(order))
    elif order.kind == Kind.EVALUATE:
        member.evaluate(group.take(order.shape))
    elif order.kind == Kind.LOAD:
        member.load()
    elif order.kind == Kind.GATHER:
        member.gather()
    elif order.kind == Kind.SAVE:
        save(group, member, None)


def _numbers(order: Order) -> Numbers:
    scale, unscale, lr, at = order.numbers
    return Numbers(scale, unscale, lr, int(at))
