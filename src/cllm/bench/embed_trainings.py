"""The trainings of ``cllm bench embed``: which there are, in what order, and the rate of each table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from cllm.bench.embed_cases import (
    BUDGETS,
    DROPOUTS,
    LEARNING_UNTIL,
    QUICK,
    QUICK_CASES,
    RATES,
    SEEDS,
    Budget,
    Case,
    main_cases,
    other_cases,
    validations,
)
from cllm.bench.embed_kept import Figures, Kept, Words, figures_of
from cllm.bench.reference import Prints, is_kept, reference_key, reference_run, text_prints
from cllm.bench.training import faster_precision


def corpus_name(corpus: str) -> str:
    """What a corpus is called: the name of its file."""
    return Path(corpus).name if corpus else "built-in"


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
    _precisions: dict[tuple[str, str, int], str] = field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The first alone where it is quick."""
        return SEEDS[:1] if self.quick else SEEDS

    def tried(self, case: Case) -> int:
        """How many learning rates were tried with this table and start."""
        return 1 if self.quick else len(self._scores(case))

    def is_tuned(self, case: Case) -> bool:
        """Whether that is all of them."""
        return self.quick or self.tried(case) == len(RATES)

    def rate(self, case: Case) -> float:
        """The best learning rate of a table and start; the first of them until all were tried."""
        if self.quick or not self.is_tuned(case):
            return RATES[0]
        scores = self._scores(case)
        return min(scores, key=lambda lr: scores[lr])

    def _scores(self, case: Case) -> dict[float, float]:
        whole = replace(case, share=1.0)
        found = {lr: self.known(whole, self.tuned_on, BUDGETS[0], lr, SEEDS[0]) for lr in RATES}
        return {lr: figures.validation_bpb for lr, figures in found.items() if figures is not None}

    def precision(self, corpus: str, budget: Budget, seed: int) -> str:
        """That of all trainings with a seed and so many tokens of a text, as they are compared: of those
        that are kept, else the faster one here."""
        place = (corpus_name(corpus), budget.name, seed)
        if place not in self._precisions:
            here = "fp32" if self.quick else faster_precision()
            self._precisions[place] = self.kept.precision(*place) or here
        return self._precisions[place]

    def untried_dropout(self, case: Case, corpus: str, budget: Budget) -> float | None:
        """The dropout to be tried next on a text; ``None`` where the best is among those that were."""
        tried = list(self._dropouts(case, corpus, budget).values())
        if self.quick or len(tried) == len(DROPOUTS):
            return None
        if tried and tried[-1].best_at >= LEARNING_UNTIL:
            return None
        if len(tried) > 1 and tried[-1].validation_bpb >= tried[-2].validation_bpb:
            return None
        return DROPOUTS[len(tried)]

    def dropout(self, case: Case, corpus: str, budget: Budget) -> float:
        """The best on a text of those that were tried; the first where none was."""
        tried = self._dropouts(case, corpus, budget)
        return min(tried, key=lambda value: tried[value].validation_bpb, default=DROPOUTS[0])

    def _dropouts(self, case: Case, corpus: str, budget: Budget) -> dict[float, Figures]:
        lr, found = self.rate(case), dict[float, Figures]()
        for dropout in DROPOUTS:
            figures = self.known(case, corpus, budget, lr, SEEDS[0], dropout)
            if figures is None:
                break
            found[dropout] = figures
        return found

    def known(
        self,
        case: Case,
        corpus: str,
        budget: Budget,
        lr: float,
        seed: int,
        dropout: float = DROPOUTS[0],
    ) -> Figures | None:
        """The figures of a training that is kept, in the file or in this machine's cache."""
        return self._figures(case, corpus, budget, lr, seed, dropout, train=False)

    def make(
        self,
        case: Case,
        corpus: str,
        budget: Budget,
        lr: float,
        seed: int,
        dropout: float = DROPOUTS[0],
    ) -> None:
        """Train where it is not kept, while there is time. Raises what ``reference_run`` does."""
        self._figures(case, corpus, budget, lr, seed, dropout, train=self.in_time)

    @property
    def in_time(self) -> bool:
        """Whether another training may begin."""
        return self.until is None or time.monotonic() < self.until

    def bpbs(self, case: Case, corpus: str, budget: Budget) -> dict[int, float]:
        """Validation bits per byte by seed, as far as they are known."""
        lr, dropout = self.rate(case), self.dropout(case, corpus, budget)
        found = {seed: self.known(case, corpus, budget, lr, seed, dropout) for seed in self.seeds}
        return {seed: f.validation_bpb for seed, f in found.items() if f is not None}

    def _figures(
        self,
        case: Case,
        corpus: str,
        budget: Budget,
        lr: float,
        seed: int,
        dropout: float,
        *,
        train: bool,
    ) -> Figures | None:
        words = Words(
            corpus=corpus_name(corpus),
            tokens=budget.name,
            table=case.name,
            start=case.start,
            steps=case.share,
            lr=lr,
            dropout=dropout,
            seed=seed,
        )
        place = (corpus, words)
        if place in self.used:
            return self.used[place]
        prints = self._prints_of(corpus)
        config = case.config(
            (corpus,) if corpus else (),
            budget,
            lr,
            seed,
            dtype=self.precision(corpus, budget, seed),
            dropout=dropout,
            validations=validations(budget, sum(size for size, _ in prints)),
            quick=self.quick,
        )
        if place not in self._keys:
            self._keys[place] = reference_key(config, prints)
        key = self._keys[place]
        figures = self.kept.get(key)
        if figures is None and (train or is_kept(key)):
            run = reference_run(config)
            figures = figures_of(run, key, words)
            self.kept.add(figures)
        if figures is not None:
            self.used[place] = figures
        return figures

    def _prints_of(self, corpus: str) -> Prints:
        if corpus not in self._prints:
            self._prints[corpus] = text_prints((corpus,) if corpus else ())
        return self._prints[corpus]


def make_all(trainings: Trainings, corpora: Sequence[str]) -> None:
    """Train all that is not known while there is time, so that what there is may be compared soon.

    First every table with one rate on one corpus, then the rates, as what follows is trained with the
    best; then each seed on all corpora before the next seed.
    """
    if trainings.quick:
        for corpus in corpora:
            for case in QUICK_CASES:
                trainings.make(case, corpus, QUICK, RATES[0], SEEDS[0])
        return
    first = BUDGETS[0]
    for case in main_cases(first):
        trainings.make(case, trainings.tuned_on, first, RATES[0], SEEDS[0])
    for case in main_cases(first):
        _tune(trainings, case)
    for budget in BUDGETS:
        for seed, corpus, case in product(SEEDS, corpora, main_cases(budget)):
            with_best_dropout(trainings, case, corpus, budget, seed)
    for case in other_cases():
        _tune(trainings, case)
        for seed in SEEDS:
            with_best_dropout(trainings, case, trainings.tuned_on, first, seed)


def _tune(trainings: Trainings, case: Case) -> None:
    for lr in RATES:
        whole = replace(case, share=1.0)
        trainings.make(whole, trainings.tuned_on, BUDGETS[0], lr, SEEDS[0])


def with_best_dropout(
    trainings: Trainings, case: Case, corpus: str, budget: Budget, seed: int
) -> None:
    """Train with ``seed`` and the best dropout, after those that are to be tried with the first seed."""
    lr = trainings.rate(case)
    while (
        dropout := trainings.untried_dropout(case, corpus, budget)
    ) is not None and trainings.in_time:
        trainings.make(case, corpus, budget, lr, SEEDS[0], dropout)
    trainings.make(case, corpus, budget, lr, seed, trainings.dropout(case, corpus, budget))
