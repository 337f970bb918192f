"""What each process does of an order, whatever the strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor

from cllm.training.feed import MicroBatches
from cllm.training.figures import Figures, Numbers


class Member(ABC):
    """One process's part; all of a group call the same method at the same time.

    ``numbers`` are ``TrainStep``'s.
    """

    @abstractmethod
    def load(self) -> None:
        """Take weights, optimizer state and buffers as the first process has them."""

    @abstractmethod
    def step_windows(self, batches: MicroBatches) -> list[Tensor]:
        """The windows of a step for each process, (2, micro-batches, rows, T) each."""

    @abstractmethod
    def step(self, windows: Tensor, numbers: Numbers) -> Figures:
        """Gradient and update."""

    @abstractmethod
    def evaluation_windows(self, ids_bt: Tensor, targets_bt: Tensor) -> list[Tensor]:
        """The same shape for a batch to score."""

    def rows_at_once(self, batch_size: int) -> int:
        """Windows of a batch to score, where a step's micro-batches have ``batch_size``."""
        return batch_size

    @abstractmethod
    def evaluate(self, windows: Tensor) -> Tensor:
        """The summed loss of all processes' windows, float64."""

    @abstractmethod
    def gather(self) -> None:
        """Bring weights and optimizer state to the first process's arena."""

    @property
    def scores(self) -> bool:
        """Whether all score together; else the first does, with the whole weights."""
        return True


class Writer(Member):
    """A member whose weights no process has whole: all write a checkpoint together."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write this process's share of a checkpoint."""
