"""The trainings of ``cllm bench embed``: which there are, in what order, and what is tuned."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from cllm.bench.embed_cases import (
    BUDGETS,
    DROPOUTS,
    HIGHER,
    LEARNING_UNTIL,
    NORMAL,
    QUICK,
    QUICK_CASES,
    RATES,
    SEEDS,
    VALIDATIONS,
    Budget,
    Case,
    main_cases,
    other_cases,
)
from cllm.bench.embed_kept import Figures, Kept, Words, compared_with, figures_of
from cllm.bench.reference import Prints, is_kept, reference_key, reference_run, text_prints
from cllm.bench.training import faster_precision
from cllm.core.config import Config


def corpus_name(corpus: str) -> str:
    """What a corpus is called: the name of its file."""
    return Path(corpus).name if corpus else "built-in"


@dataclass(frozen=True)
class Training:
    """One training: a table and start, what it is trained on, and how."""

    case: Case
    corpus: str
    """The path of a text; empty: the built-in one."""
    budget: Budget
    lr: float
    seed: int
    dropout: float = DROPOUTS[0]
    validations: int = VALIDATIONS

    @property
    def paths(self) -> tuple[str, ...]:
        """What ``data.paths`` is."""
        return (self.corpus,) if self.corpus else ()

    def words(self) -> Words:
        """What is kept beside its figures."""
        return Words(
            corpus=corpus_name(self.corpus),
            tokens=self.budget.name,
            table=self.case.name,
            start=self.case.start,
            steps=self.case.share,
            lr=self.lr,
            dropout=self.dropout,
            validations=self.validations,
            seed=self.seed,
        )

    def config(self, dtype: str, *, quick: bool) -> Config:
        """The configuration of its run."""
        return self.case.config(
            self.paths,
            self.budget,
            self.lr,
            self.seed,
            dtype=dtype,
            dropout=self.dropout,
            validations=self.validations,
            quick=quick,
        )


@dataclass
class Trainings:
    """Figures of trainings: kept ones, and those that ``make`` trains while there is time."""

    quick: bool
    kept: Kept
    tuned_on: str
    """The corpus on which learning rates are tuned, with the first seed, at the first budget."""
    until: float | None = None
    """Nothing is begun after this ``time.monotonic()``."""
    used: dict[tuple[str, Words], Figures] = field(default_factory=dict)
    """Those that are known, by path of the corpus and what they are."""
    _keys: dict[tuple[str, Words], str] = field(default_factory=dict)
    _prints: dict[str, Prints] = field(default_factory=dict)
    _precisions: dict[tuple[str, str, int, int], str] = field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The first alone where it is quick."""
        return SEEDS[:1] if self.quick else SEEDS

    def tried(self, case: Case) -> int:
        """How many learning rates were tried with this table and start."""
        return 1 if self.quick else len(self._scores(case))

    def is_tuned(self, case: Case) -> bool:
        """Whether that is all that are to be tried."""
        return self.quick or self.untried_rate(case) is None

    def untried_rate(self, case: Case) -> float | None:
        """The learning rate to be tried next; ``None`` where the best is among those that were."""
        scores = self._scores(case)
        left = [lr for lr in RATES if lr not in scores]
        if (
            not left
            and min(scores, key=lambda lr: scores[lr]) == max(RATES)
            and HIGHER not in scores
        ):
            left = [HIGHER]
        return left[0] if left else None

    def rate(self, case: Case) -> float:
        """The best learning rate of a table and start; the first of them until all were tried."""
        if self.quick or not self.is_tuned(case):
            return RATES[0]
        scores = self._scores(case)
        return min(scores, key=lambda lr: scores[lr])

    def _scores(self, case: Case) -> dict[float, float]:
        found = {lr: self.known(self.tuning(case, lr)) for lr in (*RATES, HIGHER)}
        return {lr: figures.validation_bpb for lr, figures in found.items() if figures is not None}

    def tuning(self, case: Case, lr: float) -> Training:
        """That which says how good a learning rate is for a table and start."""
        whole = replace(case, share=1.0)
        return Training(whole, self.tuned_on, BUDGETS[0], lr, SEEDS[0], validations=1)

    def _precision(self, words: Words) -> str:
        """That of all trainings that are compared with each other: of those that are kept, else the faster
        one here."""
        place = compared_with(words)
        if place not in self._precisions:
            here = "fp32" if self.quick else faster_precision()
            self._precisions[place] = self.kept.precision(words) or here
        return self._precisions[place]

    def untried_dropout(self, case: Case, corpus: str, budget: Budget) -> float | None:
        """The dropout to be tried next on a text; ``None`` where the best is among those that were.

        The random start's series goes on while it helps, so that no other table has an advantage by it;
        another's ends as well once learning does not end early any more.
        """
        series = self._series(case, corpus, budget)
        tried = list(self.dropouts(case, corpus, budget).values())
        if self.quick or len(tried) == len(series):
            return None
        if len(tried) > 1 and tried[-1].validation_bpb >= tried[-2].validation_bpb:
            return None
        goes_on = case == NORMAL and len(tried) > 1
        if tried and not goes_on and tried[-1].best_at >= LEARNING_UNTIL:
            return None
        return series[len(tried)]

    def dropout(self, case: Case, corpus: str, budget: Budget) -> float:
        """The best on a text of those that were tried; the first of its series where none was."""
        tried = self.dropouts(case, corpus, budget)
        first = self._series(case, corpus, budget)[0]
        return min(tried, key=lambda value: tried[value].validation_bpb, default=first)

    def _series(self, case: Case, corpus: str, budget: Budget) -> tuple[float, ...]:
        """Those that may be tried, in turn: from the random start's best on, for what learns faster than it
        needs no less."""
        if case == NORMAL:
            return DROPOUTS
        return DROPOUTS[DROPOUTS.index(self.dropout(NORMAL, corpus, budget)) :]

    def dropouts(self, case: Case, corpus: str, budget: Budget) -> dict[float, Figures]:
        """Figures of the first seed by dropout, of those that were tried on a text."""
        first, found = self.training(case, corpus, budget, SEEDS[0]), dict[float, Figures]()
        for dropout in self._series(case, corpus, budget):
            figures = self.known(replace(first, dropout=dropout))
            if figures is None:
                break
            found[dropout] = figures
        return found

    def training(self, case: Case, corpus: str, budget: Budget, seed: int) -> Training:
        """That with the best learning rate, without dropout."""
        return Training(case, corpus, budget, self.rate(case), seed)

    def tuned(self, case: Case, corpus: str, budget: Budget, seed: int) -> Training:
        """That with the best dropout, too, as far as they were tried."""
        plain = self.training(case, corpus, budget, seed)
        return replace(plain, dropout=self.dropout(case, corpus, budget))

    def known(self, training: Training) -> Figures | None:
        """The figures of a training that is kept, in the file or in this machine's cache."""
        return self._figures(training, train=False)

    def make(self, training: Training) -> None:
        """Train where it is not kept, while there is time. Raises what ``reference_run`` does."""
        self._figures(training, train=self.in_time)

    @property
    def in_time(self) -> bool:
        """Whether another training may begin."""
        return self.until is None or time.monotonic() < self.until

    def bpbs(self, case: Case, corpus: str, budget: Budget) -> dict[int, float]:
        """Validation bits per byte by seed, as far as they are known."""
        found = {s: self.known(self.tuned(case, corpus, budget, s)) for s in self.seeds}
        return {seed: f.validation_bpb for seed, f in found.items() if f is not None}

    def _figures(self, training: Training, *, train: bool) -> Figures | None:
        corpus, words = training.corpus, training.words()
        place = (corpus, words)
        if place in self.used:
            return self.used[place]
        if corpus not in self._prints:
            self._prints[corpus] = text_prints(training.paths)
        config = training.config(self._precision(words), quick=self.quick)
        if place not in self._keys:
            self._keys[place] = reference_key(config, self._prints[corpus])
        key = self._keys[place]
        figures = self.kept.get(key)
        if figures is None and (train or is_kept(key)):
            run = reference_run(config)
            figures = figures_of(run, key, words)
            self.kept.add(figures)
        if figures is not None:
            self.used[place] = figures
        return figures


def make_all(trainings: Trainings, corpora: Sequence[str]) -> None:
    """Train all that is not known while there is time, so that what there is may be compared soon.

    First the rates, as what follows is trained with the best; then each seed on all corpora before the
    next seed. What the claims do not need comes last, at first where the rates are tuned.
    """
    if trainings.quick:
        for corpus, case in product(corpora, QUICK_CASES):
            trainings.make(trainings.training(case, corpus, QUICK, SEEDS[0]))
        return
    first = BUDGETS[0]
    for case in main_cases(first):
        _tune(trainings, case)
    for budget in BUDGETS:
        for seed, corpus, case in product(SEEDS, corpora, main_cases(budget)):
            make_tuned(trainings, case, corpus, budget, seed)
    for case in other_cases():
        _tune(trainings, case)
        for seed in SEEDS:
            make_tuned(trainings, case, trainings.tuned_on, first, seed)
    for budget in BUDGETS:
        for seed, corpus, case in product(SEEDS, corpora, other_cases()):
            make_tuned(trainings, case, corpus, budget, seed)


def _tune(trainings: Trainings, case: Case) -> None:
    while trainings.in_time:
        lr = trainings.untried_rate(case)
        if lr is None:
            break
        trainings.make(trainings.tuning(case, lr))


def make_tuned(trainings: Trainings, case: Case, corpus: str, budget: Budget, seed: int) -> None:
    """Train with the best rate and dropout, after the dropouts that are to be tried with the first seed."""
    first = trainings.training(case, corpus, budget, SEEDS[0])
    while trainings.in_time:
        dropout = trainings.untried_dropout(case, corpus, budget)
        if dropout is None:
            break
        trainings.make(replace(first, dropout=dropout))
    trainings.make(trainings.tuned(case, corpus, budget, seed))
