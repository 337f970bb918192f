"""``cllm bench embed``: kinds and starts of the token table, by what the same tokens seen teach.

Every training is a reference run. Its figures are kept with the project (``embed_kept``): a bench that
``--minutes`` stopped goes on where it was when it is called again, on any machine. The learning rate of
each table is tuned on the first corpus, with the first seed, at the smaller budget; its dropout on each
corpus at each budget, with the first seed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import product
from statistics import mean, stdev
from typing import Any

from cllm.bench import embed_speed
from cllm.bench.embed_cases import (
    BUDGETS,
    COMPOSED,
    CORPUS,
    DROPOUTS,
    HIGHER,
    LEARNING_UNTIL,
    NORMAL,
    QUICK,
    QUICK_CASES,
    RANK32,
    RANK64,
    RATES,
    SEEDS,
    VALIDATIONS,
    Budget,
    Case,
    main_cases,
    other_cases,
    shortened,
)
from cllm.bench.embed_kept import NAME, Kept, machines
from cllm.bench.embed_trainings import Trainings, corpus_name, make_all
from cllm.bench.harness import Claim, Options, Result, load_now
from cllm.core.cpu import is_busy

TAKES = frozenset({"data", "minutes"})
UNMEASURED = "not all of it is measured yet: call the bench again"


def run(options: Options) -> Result:
    """Train what is not kept, and compare; ``quick`` trains next to nothing and judges nothing."""
    load, busy = load_now(), is_busy()
    until = time.monotonic() + 60 * options.minutes if options.minutes is not None else None
    corpora = list(options.data) if options.quick and options.data else ["", *options.data]
    trainings = Trainings(
        quick=options.quick, kept=Kept(write=options.write), tuned_on=corpora[0], until=until
    )
    make_all(trainings, corpora)
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    for budget in (QUICK,) if options.quick else BUDGETS:
        for corpus in corpora:
            judge = _Judge(trainings, corpus, budget)
            rows += [judge.row(c) for c in (QUICK_CASES if options.quick else _all_cases(budget))]
            claims += judge.claims(quick=options.quick)
    # While others keep the machine busy, speeds would not be judged: they are not measured.
    measured = options.quick or not busy
    speeds = embed_speed.speeds(corpora[0], quick=options.quick) if measured else {}
    for row in rows:
        speed = speeds.get(row["table"])
        row["tokens/s"] = round(speed.tokens_per_second) if speed else None
        row["tokens/s over dense"] = round(speed.over_dense, 2) if speed else None
    if options.quick:
        claims = [replace(claim, judged=False, why="quick: too short to judge") for claim in claims]
    else:
        claims += embed_speed.claims(speeds, busy)
    return Result(
        bench="embed",
        rows=[row for row in rows if row["bits per byte"] is not None],
        claims=claims,
        notes=[*_notes(trainings), *_series(trainings, [] if options.quick else corpora)],
        load_before=load,
        headline=[] if options.quick else _headline(trainings, corpora),
    )


def _all_cases(budget: Budget) -> list[Case]:
    return [*main_cases(budget), *other_cases()]


def _headline(trainings: Trainings, corpora: list[str]) -> list[dict[str, Any]]:
    """Bits per byte of what the claims are about, a column for each text; what lacks a seed is left out,
    as texts that are held out differ more than tables do."""
    rows = []
    for budget in BUDGETS:
        tables = {
            "random start": NORMAL,
            f"corpus start, {budget.required_share:.0%} of the steps": shortened(budget)[0],
            "corpus start, rank 64": RANK64,
            "corpus start, rank 32": RANK32,
        }
        for table, case in tables.items():
            found = {c: list(trainings.bpbs(case, c, budget).values()) for c in corpora}
            if all(len(each) == len(trainings.seeds) for each in found.values()):
                bpbs = {corpus_name(c): f"{mean(each):.3f}" for c, each in found.items()}
                rows.append({"tokens": budget.name, "token table": table} | bpbs)
    return rows


def _notes(trainings: Trainings) -> list[str]:
    used = trainings.used.values()
    dropouts = ", ".join(f"{dropout:g}" for dropout in DROPOUTS)
    rates = ", ".join(f"{rate:g}" for rate in sorted(RATES))
    return [
        "Bits per byte of validation text, of the weights that `cllm train` keeps: the best of "
        f"{VALIDATIONS} validations. Mean and standard deviation over the seeds; a seed draws the text "
        "that is held out, too, so that `sd` says more of texts than of tables. `steps` is the share "
        "of the budget's steps, with a schedule of that length. `over dense`: the mean of the seeds' "
        "ratios to the dense table with the same start (`crystal`: random) and all of the steps, and "
        "its standard error.",
        "`lr tried`: learning rates tried for the table and start on the first text with "
        f"{BUDGETS[0].name} tokens, {rates} and, where the highest is best, {HIGHER:g}, by the score of "
        "the weights of the end. The best serves all texts and budgets; until all are tried, "
        f"{RATES[0]:g} does.",
        "`dropout`: of embeddings and residuals, the best with the first seed of "
        f"{dropouts} on a text: the second where the first left the best weights before "
        f"{LEARNING_UNTIL:.0%} of the steps, further ones while the last helped. Other tables begin with "
        "the random start's best, and try none after one that left the best weights later than that.",
        "`bytes`: of the table in a checkpoint. `half width retains`: the share of the trained table's "
        "energy ‖E‖² that its best approximation of half the width keeps. `defect → after reduction`: "
        "orthogonality defect of the trained basis, and what LLL would make of it.",
        f"Trainings: {len(used)}, each with its machine in [{NAME}]({NAME}): {machines(used)}.",
        "`tokens/s`: what `cllm train` does here with tables of this kind and width in a training so long "
        "that compiling pays, on the first text, at the end of this call; "
        f"{embed_speed.AT_ONCE} kinds at a time took turns with the dense table, and `tokens/s over "
        "dense` is the ratio in the same rounds. Steps are from all over a training, as the similarity "
        "loss fades.",
    ]


def _series(trainings: Trainings, corpora: list[str]) -> list[str]:
    """What each dropout came to where several were tried, a text and budget in a line."""
    lines = []
    for budget, corpus in product(BUDGETS, corpora):
        found = []
        for case in _all_cases(budget):
            tried = trainings.dropouts(case, corpus, budget)
            if len(tried) > 1:
                each = (
                    f"{dropout:g} {figures.validation_bpb:.3f} at {figures.best_at:.0%}"
                    for dropout, figures in tried.items()
                )
                share = f" with {case.share:.0%} of the steps" if case.share < 1 else ""
                found.append(f"{case.name}, {case.start}{share}: {', '.join(each)}")
        if found:
            lines.append(
                f"Dropouts tried on {corpus_name(corpus)}, {budget.name} tokens (bits per byte, and after "
                f"which share of the steps the weights were best): {'; '.join(found)}."
            )
    return lines


def _standard_error(values: list[float]) -> float:
    return float(stdev(values) / len(values) ** 0.5)


@dataclass
class _Judge:
    """Rows and claims of one corpus and budget."""

    trainings: Trainings
    corpus: str
    budget: Budget

    def row(self, case: Case) -> dict[str, Any]:
        """One line of the table; figures that are not measured are ``None``."""
        first = self.trainings.tuned(case, self.corpus, self.budget, SEEDS[0])
        facts, found = self.trainings.known(first), list(self.bpbs(case).values())
        defects = facts.log2_defects if facts else None
        return {
            "corpus": self.name,
            "tokens": self.budget.name,
            "table": case.name,
            "start": case.start,
            "steps": case.share,
            "lr": first.lr,
            "lr tried": self.trainings.tried(case),
            "dropout": first.dropout,
            "table numbers": facts.table_numbers if facts else None,
            "bytes": facts.table_bytes if facts else None,
            "bits per byte": mean(found) if found else None,
            "sd": stdev(found) if len(found) > 1 else None,
            "seeds": len(found),
            "over dense": self._over_dense(case),
            "half width retains": facts.half_width_retains if facts else None,
            "defect → after reduction": defects and "2^{:.1f} → 2^{:.1f}".format(*defects),
        }

    def _over_dense(self, case: Case) -> str | None:
        """The ratio to the dense table that starts alike (``crystal``: at random)."""
        peer = CORPUS if case.start == CORPUS.start else NORMAL
        each = [] if case == peer else self._ratios(case, peer)
        return f"{mean(each):.3f} ± {_standard_error(each):.3f}" if len(each) > 1 else None

    @property
    def name(self) -> str:
        return corpus_name(self.corpus)

    def bpbs(self, case: Case) -> dict[int, float]:
        return self.trainings.bpbs(case, self.corpus, self.budget)

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
            replace(aim, required=None, aim=1.0, why=aim.why or "an aim"),
            self._above(f"rank 32 over dense random: {where}", RANK32, self.budget.required_rank32),
            # Either answer will do, if the error bars say which.
            replace(composed, required=None, why=composed.why or "shown, not required"),
        ]

    def _ratios(self, case: Case, peer: Case) -> list[float]:
        """Bits per byte of ``case`` over those of ``peer``, a seed each."""
        ours, theirs = self.bpbs(case), self.bpbs(peer)
        return [ours[seed] / theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]

    def _above(self, name: str, case: Case, allowed: float, peer: Case = NORMAL) -> Claim:
        """The ratio of bits per byte of ``case`` to those of ``peer``, with the seeds that both have, and
        its standard error: a seed draws the split, too, so that its two trainings belong together."""
        each = self._ratios(case, peer)
        tuned = self._is_tuned(case) and self._is_tuned(peer)
        measured = tuned and len(each) == len(self.trainings.seeds)
        if len(each) > 1:
            name += f" ({len(each)} seeds ± {_standard_error(each):.4f})"
        return Claim(
            name=name,
            value=mean(each) if each else None,
            required=1.0 + allowed,
            higher_is_better=False,
            judged=measured,
            why="" if measured else UNMEASURED,
        )

    def _is_tuned(self, case: Case) -> bool:
        untried = self.trainings.untried_dropout(case, self.corpus, self.budget)
        return self.trainings.is_tuned(case) and untried is None
