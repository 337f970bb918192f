"""The run in TensorBoard: scalars, histograms of the weights, samples of text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from torch import Tensor


class Board:
    """Writes to ``tensorboard/`` of a run; a context manager.

    Flush before each checkpoint: what is resumed from it then has all its events, and the events after
    it, of the process that was killed, are hidden by TensorBoard.
    """

    def __init__(self, directory: Path, *, resume_from: int | None = None) -> None:
        """Write below ``directory``; on resume from a step, events after it are superseded."""
        # Imported here: it takes a good part of a second, and `log.tensorboard = false` saves it.
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_from is None else resume_from + 1
        self._writer: Any = SummaryWriter(str(directory), purge_step=purge)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of ``step`` by name; a slash groups them (``train/loss``)."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Distributions of tensors of any shape by name. A non-finite value makes no histogram."""
        for name, tensor in tensors.items():
            values = tensor.detach().float()
            if values.numel() and bool(values.isfinite().all()):
                self._writer.add_histogram(name, values, step)

    def text(self, step: int, name: str, text: str) -> None:
        """A sample of text, shown as it is (TensorBoard would read it as Markdown)."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_text(name, indented, step)

    def flush(self) -> None:
        """Write the events so far down."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class NoBoard(Board):
    """Writes nothing (``log.tensorboard = false``)."""

    def __init__(self) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        pass

    def text(self, step: int, name: str, text: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_board(directory: Path, *, enabled: bool = True, resume_from: int | None = None) -> Board:
    """The board of a run, or one that writes nothing."""
    return Board(directory, resume_from=resume_from) if enabled else NoBoard()
