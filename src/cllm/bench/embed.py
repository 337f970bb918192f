"""``cllm bench embed``: kinds and starts of the token table, by what the same tokens seen teach.

Every training is a reference run, kept in the user's cache: a bench that ``--minutes`` stopped goes on
where it was when it is called again. The learning rate of each table is tuned on the first corpus, with
the first seed, at the smaller budget.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from cllm.bench import embed_speed
from cllm.bench.embed_cases import (
    BUDGETS,
    COMPOSED,
    CORPUS,
    NORMAL,
    QUICK,
    RANK32,
    RANK64,
    RATES,
    SEEDS,
    Budget,
    Case,
    main_cases,
    other_cases,
    shortened,
)
from cllm.bench.harness import Claim, Options, Result, load_now
from cllm.bench.reference import is_kept, reference_run
from cllm.core.cpu import is_busy

TAKES = frozenset({"data", "minutes"})
UNMEASURED = "not all of it is measured yet: call the bench again"


@dataclass
class Trainings:
    """Figures of trainings, trained when they are asked for while there is time."""

    quick: bool
    until: float | None
    tuned_on: str
    """The corpus on which learning rates are tuned."""
    made: dict[Any, dict[str, Any] | None] = field(default_factory=dict)

    def rate(self, case: Case) -> float:
        """The best learning rate of a table and start; of the tried ones while not all are measured."""
        if self.quick:
            return RATES[0]
        whole, scores = replace(case, share=1.0), {}
        for lr in RATES:
            facts = self.facts(whole, self.tuned_on, BUDGETS[0], lr, SEEDS[0])
            if facts is not None:
                scores[lr] = facts["validation_bpb"]
        return min(scores, key=lambda lr: scores[lr]) if scores else RATES[0]

    def facts(
        self, case: Case, corpus: str, budget: Budget, lr: float, seed: int
    ) -> dict[str, Any] | None:
        """The status figures of one training; ``None`` where the time is over and it was not kept."""
        key = (case.name, case.start, case.share, corpus, budget.name, lr, seed)
        if key not in self.made:
            paths = (corpus,) if corpus else ()
            config = case.config(paths, budget, lr, seed, self.quick)
            late = self.until is not None and time.monotonic() > self.until
            kept = not late or is_kept(config)
            self.made[key] = reference_run(config).status().facts if kept else None
        return self.made[key]

    def bpbs(self, case: Case, corpus: str, budget: Budget, lr: float) -> list[float]:
        """Validation bits per byte of all seeds, as far as they were measured."""
        seeds = SEEDS[:1] if self.quick else SEEDS
        found = [self.facts(case, corpus, budget, lr, seed) for seed in seeds]
        return [facts["validation_bpb"] for facts in found if facts is not None]


def run(options: Options) -> Result:
    """Train what is not kept, and compare; ``quick`` trains next to nothing and judges nothing."""
    load, busy = load_now(), is_busy()
    until = time.monotonic() + 60 * options.minutes if options.minutes is not None else None
    corpora = list(options.data) if options.quick else ["", *options.data]
    trainings = Trainings(quick=options.quick, until=until, tuned_on=corpora[0])
    budgets = (QUICK,) if options.quick else BUDGETS
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    for budget in budgets:
        for corpus in corpora:
            judge = _Judge(trainings, corpus, budget)
            cases = main_cases(budget) if not options.quick else [NORMAL, CORPUS, RANK64]
            rows += [judge.row(case) for case in cases]
            claims += judge.claims(quick=options.quick)
    if not options.quick:
        judge = _Judge(trainings, corpora[0], budgets[0])
        rows += [judge.row(case) for case in other_cases()]
    in_time = until is None or time.monotonic() < until
    speeds = embed_speed.rates(quick=options.quick) if in_time else {}
    for row in rows:
        rates = speeds.get(row["table"])
        row["tokens/s"] = round(median(rates)) if rates else None
    if options.quick:
        claims = [replace(claim, judged=False, why="quick: too short to judge") for claim in claims]
    else:
        claims += embed_speed.claims(speeds, busy)
    return Result(
        bench="embed",
        rows=[row for row in rows if row["bits per byte"] is not None],
        claims=claims,
        notes=[
            "Bits per byte of validation text at the end of training, mean and standard deviation over the "
            "seeds; `steps` is the share of the budget's steps, with a schedule of that length.",
            "`tokens/s`: tables of this kind and width in turns, at the end of this call.",
        ],
        load_before=load,
    )


@dataclass
class _Judge:
    """Rows and claims of one corpus and budget."""

    trainings: Trainings
    corpus: str
    budget: Budget

    def bpbs(self, case: Case) -> list[float]:
        lr = self.trainings.rate(case)
        return self.trainings.bpbs(case, self.corpus, self.budget, lr)

    def row(self, case: Case) -> dict[str, Any]:
        """One line of the table; figures that are not measured are ``None``."""
        lr, found = self.trainings.rate(case), self.bpbs(case)
        facts = self.trainings.facts(case, self.corpus, self.budget, lr, SEEDS[0]) or {}
        table = facts.get("table", {})
        basis = table.get("basis", {})
        after: dict[str, Any] = next(
            (v for k, v in table.items() if k.startswith("basis after")), {}
        )
        defect = None
        if basis:
            defect = f"2^{basis['log2_defect']:.1f} → 2^{after['log2_defect']:.1f}"
        return {
            "corpus": self.name,
            "tokens": self.budget.name,
            "table": case.name,
            "start": case.start,
            "steps": case.share,
            "lr": lr,
            "table numbers": table.get("numbers"),
            "bits per byte": mean(found) if found else None,
            "sd": stdev(found) if len(found) > 1 else None,
            "seeds": len(found),
            "half width retains": table.get("retained_at_half"),
            "defect → after reduction": defect,
        }

    @property
    def name(self) -> str:
        return Path(self.corpus).name if self.corpus else "built-in"

    def claims(self, *, quick: bool) -> list[Claim]:
        """What is required of the corpus start, of the ranks, and what is said of composed tables."""
        where = f"{self.name}, {self.budget.name} tokens"
        long, short = (CORPUS, CORPUS) if quick else shortened(self.budget)
        percent = f"{self.budget.required_share:.0%}"
        found = [
            self._above(f"corpus start at {percent} of the steps over random: {where}", long, 0.0),
            self._above(f"rank 64 over dense random: {where}", RANK64, self.budget.required_rank64),
        ]
        if quick:
            return found
        aim = self._above(
            f"corpus start at {self.budget.aim_share:.0%} of the steps over random (aim): {where}",
            short,
            0.0,
        )
        composed = self._above(
            f"composed over dense at the same start: {where}", COMPOSED, 0.0, CORPUS
        )
        return [
            *found,
            replace(aim, required=None, aim=1.0, why="an aim"),
            self._above(f"rank 32 over dense random: {where}", RANK32, self.budget.required_rank32),
            # Either answer will do, if the error bars say which.
            replace(composed, required=None, why="shown, not required"),
        ]

    def _above(self, name: str, case: Case, allowed: float, peer: Case = NORMAL) -> Claim:
        """The ratio of bits per byte of ``case`` to those of ``peer``."""
        ours, theirs = self.bpbs(case), self.bpbs(peer)
        whole = len(SEEDS) if not self.trainings.quick else 1
        measured = len(ours) == len(theirs) == whole
        return Claim(
            name=name,
            value=mean(ours) / mean(theirs) if ours and theirs else None,
            required=1.0 + allowed,
            higher_is_better=False,
            judged=measured,
            why="" if measured else UNMEASURED,
        )
