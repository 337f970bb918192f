"""The end of a run that a signal stops: what is whole is saved, and what was lost is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from cllm.training.interrupt import Interrupt
from cllm.training.saving import Saver
from cllm.training.snapshot import Standing


def save_and_raise(
    saver: Saver,
    standing: Standing,
    interrupt: Interrupt,
    besides: str,
    *,
    made: int,
    rewind: Callable[[], Standing | None] | None = None,
) -> NoReturn:
    """Save what was trained (before what was given up, if anything was) and raise ``interrupt``'s error.

    It says ``besides``, or what was lost. ``made``: the steps that the weights have seen, which are those
    of ``standing`` unless it was given up between the two. ``rewind``: brings a pipeline back to its last
    drain and returns where that was, or ``None`` where a stage does not end.
    """
    step, found = saver.step, standing if rewind is None else None
    with interrupt.saving():
        step.undo()
        whole = step.is_whole
        if standing.unvalidated:  # the pipeline, if there is one, is drained
            found, besides = standing, "; its validation was given up, and is the first that comes"
        elif rewind is not None:
            found = rewind()
        else:
            whole = whole and made == standing.step
        if whole and found is not None:
            saver.save_once(found)
            interrupt.raise_pending(found.step, besides)
        saver.background.wait()
        last = saver.run.steps()[-1]
    if last == standing.step:
        interrupt.raise_pending(last, besides)
    why = "was changing the weights" if rewind is None else "does not end"
    interrupt.raise_pending(last, f"; what followed is lost, as a step that {why} was given up")
