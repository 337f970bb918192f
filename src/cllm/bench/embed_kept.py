"""``docs/results/embed-runs.jsonl``: figures of trainings of ``cllm bench embed``, one training a line.

The weights are in the cache of the machine that trained, and go with it. What a training taught does not
depend on the machine (up to rounding, in one precision), and takes core-hours to measure: it is kept with
the project.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from cllm.bench.harness import RESULTS
from cllm.core.atomic import clear_errors, write_text
from cllm.core.errors import UserError
from cllm.core.section import Section
from cllm.store.run import RunDirectory
from cllm.store.steps import best_step

NAME = "embed-runs.jsonl"


class Words(Section):
    """What a training is, for people: its key stands for all of its settings and its text."""

    corpus: str
    tokens: str
    table: str
    start: str
    steps: float
    lr: float
    dropout: float
    validations: int
    """1 where the learning rate is tuned, and the weights of the end are scored; else the best are."""
    seed: int


class Figures(Words):
    """A line: the key of a reference run, what was measured of it, and where."""

    key: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    validation_bpb: Annotated[float, Field(gt=0)]
    best_at: Annotated[float, Field(gt=0, le=1)]
    """The share of the steps after which the weights did best on validation text."""
    table_numbers: int
    table_bytes: int
    """In a checkpoint, with the pieces' places."""
    half_width_retains: float
    log2_defects: tuple[float, float] | None
    """Of the table's basis, before and after lattice reduction."""
    processor: str
    threads: int
    dtype: str
    date: str
    cllm: str
    torch: str


def figures_of(run: RunDirectory, key: str, words: Words) -> Figures:
    """The line of a run that has been trained."""
    status = run.status()
    facts, table = status.facts, status.facts["table"]
    train = run.read_config()["train"]
    best = best_step(run.path)
    after = next((v for name, v in table.items() if name.startswith("basis after")), None)
    return Figures(
        **words.model_dump(),
        key=key,
        validation_bpb=facts["validation_bpb"],
        best_at=best / train["steps"] if best else 1.0,
        table_numbers=table["numbers"],
        table_bytes=table["bytes"],
        half_width_retains=table["retained_at_half"],
        log2_defects=after and (table["basis"]["log2_defect"], after["log2_defect"]),
        processor=facts["machine"]["processor"],
        threads=facts["machine"]["threads"],
        dtype=train["dtype"],
        date=status.created[:10],
        cllm=facts["versions"]["cllm"],
        torch=facts["versions"]["torch"],
    )


class Kept:
    """The lines of the file below ``root``. ``add`` writes to it only where ``write`` says so."""

    def __init__(self, *, write: bool, root: Path = Path()) -> None:
        self.path, self.write = root / RESULTS / NAME, write
        self._found = _parse(self.path, self._text())

    def get(self, key: str) -> Figures | None:
        """The line of the reference run ``key``."""
        return self._found.get(key)

    def precision(self, words: Words) -> str | None:
        """That of the trainings that ``words`` is compared with; ``None`` if there is none."""
        wanted = compared_with(words)
        found = (
            figures.dtype for figures in self._found.values() if compared_with(figures) == wanted
        )
        return next(found, None)

    def add(self, figures: Figures) -> None:
        """Append a line, at once: a bench that is killed loses only the training at hand."""
        self._found[figures.key] = figures
        if not self.write:
            return
        text = self._text()  # another bench may have written meanwhile
        if figures.key not in _parse(self.path, text):
            if text and not text.endswith("\n"):
                text += "\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, f"{text}{figures.model_dump_json()}\n")

    def _text(self) -> str:
        with clear_errors(self.path, "read"):
            try:
                return self.path.read_text(encoding="utf-8")
            except FileNotFoundError:
                return ""
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path} is not UTF-8: {error}; restore it") from error


def compared_with(words: Words) -> tuple[str, str, int, int]:
    """What is the same in all trainings that a training is compared with."""
    return words.corpus, words.tokens, words.seed, words.validations


def _parse(path: Path, text: str) -> dict[str, Figures]:
    """Lines by key. Raises ``UserError`` for a line that is broken or there twice."""
    found, places = dict[str, Figures](), dict[str, int]()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            figures = Figures.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            what = ".".join(map(str, first["loc"])) or "the line"
            raise UserError(
                f"{path}, line {number}: {what}: {first['msg']}; mend the line, or delete it to have its "
                "training done again"
            ) from error
        if figures.key in places:
            raise UserError(
                f"{path}, line {number}: the same training as line {places[figures.key]}; delete one"
            )
        found[figures.key], places[figures.key] = figures, number
    return found


def machines(figures: Iterable[Figures]) -> str:
    """On which machines trainings ran, the one with most of them first."""
    counted = Counter(
        (f.processor, f.threads, f.dtype, f"torch {f.torch}", f"cllm {f.cllm}") for f in figures
    )
    return "; ".join(
        f"{count} on {processor} ({threads} thread{'s' * (threads > 1)}, {', '.join(rest)})"
        for (processor, threads, *rest), count in counted.most_common()
    )
