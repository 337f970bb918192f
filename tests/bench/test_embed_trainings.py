"""Trainings of the bench of token tables: in a useful order, tuned, and judged only when whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pytest

from cllm.bench import embed_kept, embed_trainings
from cllm.bench.embed import UNMEASURED, _Judge, _notes, _series
from cllm.bench.embed_cases import (
    BUDGETS,
    CORPUS,
    DROPOUTS,
    HIGHER,
    NORMAL,
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
from cllm.bench.embed_kept import NAME, Kept
from cllm.bench.embed_trainings import Trainings, _tune, make_all, make_tuned
from cllm.bench.reference import reference_key
from cllm.core.config import Config
from cllm.store.run import RunDirectory

FILE = Path("docs", "results", NAME)
BEST = RATES[1]
"""With it the fake trainings learn most."""


def put(*lines: str) -> None:
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")


def rate_decides(config: Config) -> tuple[float, float]:
    """Bits per byte, and the share of the steps at which they were best."""
    return 1.9 - 0.1 * (config.train.lr == BEST), 1.0


class Fake:
    """Stands for training: takes no time, and ends by Ctrl-C after ``most`` trainings."""

    def __init__(self, trained: Path) -> None:
        self.run, self.most, self.trained = trained, 10_000, list[Config]()
        self.ends: Callable[[Config], tuple[float, float]] = rate_decides

    def __call__(self, config: Config) -> Any:
        if len(self.trained) == self.most:
            raise KeyboardInterrupt
        self.trained.append(config)
        status = RunDirectory.open(self.run).status()
        bpb, best_at = self.ends(config)
        known = replace(status, facts=status.facts | {"validation_bpb": bpb})

        class Run:
            path = round(best_at * config.train.steps)

            def status(self) -> Any:
                return known

            def read_config(self) -> Any:
                return {"train": {"dtype": config.train.dtype, "steps": config.train.steps}}

        return Run()


@pytest.fixture
def fake(trained: Path, monkeypatch: pytest.MonkeyPatch, isolated: Path) -> Fake:
    made = Fake(trained)
    monkeypatch.setattr(embed_trainings, "reference_run", made)
    monkeypatch.setattr(embed_trainings, "is_kept", lambda key: False)
    monkeypatch.setattr(embed_kept, "best_step", lambda step: step)
    monkeypatch.setattr(embed_trainings, "faster_precision", lambda: "fp32")
    return made


@pytest.fixture
def corpora(isolated: Path) -> list[str]:
    for name in ("one.txt", "two.txt"):
        Path(name).write_text(f"What {name} says.\n", encoding="utf-8")
    return ["one.txt", "two.txt"]


@pytest.fixture
def whole(fake: Fake, corpora: list[str]) -> Callable[[], Trainings]:
    """All that the claims of the first budget need is in the file; makes what the bench sees of it."""
    first = Trainings(quick=False, kept=Kept(write=True), tuned_on="one.txt")
    budget = BUDGETS[0]
    for case in main_cases(budget):
        for lr in RATES:
            first.make(first.tuning(case, lr))
        for corpus in corpora:
            for seed in SEEDS:
                make_tuned(first, case, corpus, budget, seed)

    def again() -> Trainings:
        return Trainings(quick=False, kept=Kept(write=False), tuned_on="one.txt", until=0.0)

    return again


def without(drop: Callable[[dict[str, Any]], bool]) -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    kept = [text for text in lines if not drop(json.loads(text))]
    assert len(kept) < len(lines)
    put(*kept)


def test_a_kill_loses_only_the_training_at_hand(fake: Fake, corpora: list[str]) -> None:
    fake.most = 5
    with pytest.raises(KeyboardInterrupt):
        make_all(Trainings(quick=False, kept=Kept(write=True), tuned_on="one.txt"), corpora)
    keys = {reference_key(config) for config in fake.trained}
    lines = map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
    assert {one["key"] for one in lines} == keys
    assert len(keys) == 5
    fake.most = 6
    with pytest.raises(KeyboardInterrupt):
        make_all(Trainings(quick=False, kept=Kept(write=True), tuned_on="one.txt"), corpora)
    assert len({reference_key(config) for config in fake.trained}) == 6


def test_first_the_rates_then_seeds_in_turns(fake: Fake, corpora: list[str]) -> None:
    make_all(Trainings(quick=False, kept=Kept(write=False), tuned_on="one.txt"), corpora)
    keys = [reference_key(config) for config in fake.trained]
    assert len(keys) == len(set(keys))
    cases = main_cases(BUDGETS[0])
    tables = len([case for case in cases if case.share == 1.0])
    tuning, rest = fake.trained[: tables * len(RATES)], fake.trained[tables * len(RATES) :]
    assert {(c.train.seed, c.data.paths) for c in tuning} == {(0, ("one.txt",))}
    assert [c.train.lr for c in tuning] == [*RATES] * tables
    steps = BUDGETS[0].tokens // 2048
    small = [c for c in rest if c.train.steps <= steps + 1][: len(cases) * 6]
    assert {c.train.lr for c in small} == {BEST}
    turns = [key for key, _ in groupby((c.train.seed, *c.data.paths) for c in small)]
    assert turns == [(seed, corpus) for seed in SEEDS for corpus in corpora]
    # Claims need the second budget, too; what else is compared comes last, on all texts at both budgets.
    alike: dict[str, Any] = {
        "lr": BEST,
        "dtype": "fp32",
        "dropout": 0.0,
        "validations": VALIDATIONS,
    }

    def all_of(cases_of: Callable[[Budget], list[Case]]) -> set[str]:
        return {
            reference_key(case.config((corpus,), budget, seed=seed, **alike))
            for budget, corpus, seed in product(BUDGETS, corpora, SEEDS)
            for case in cases_of(budget)
        }

    claimed, others = all_of(main_cases), all_of(lambda budget: other_cases())
    left = [reference_key(config) for config in rest]
    assert set(left[: len(claimed)]) == claimed
    assert others <= set(left[len(claimed) :])


def test_what_is_compared_is_of_one_precision(
    fake: Fake, corpora: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seed goes on in what it was begun in, on a machine that would choose another, too."""
    budget = BUDGETS[0]

    def make(seed: int, *cases: Case) -> None:
        trainings = Trainings(quick=False, kept=Kept(write=True), tuned_on="one.txt")
        for case in cases:
            trainings.make(trainings.training(case, "one.txt", budget, seed))

    make(0, NORMAL)
    monkeypatch.setattr(embed_trainings, "faster_precision", lambda: "bf16")
    make(0, NORMAL, CORPUS)
    make(1, NORMAL)
    seen = [(c.train.seed, c.model.embedding.init, c.train.dtype) for c in fake.trained]
    assert seen == [(0, "normal", "fp32"), (0, "corpus", "fp32"), (1, "normal", "bf16")]


def test_what_is_compared_is_validated_on_the_way(fake: Fake, corpora: list[str]) -> None:
    """Else a start that learns faster is compared after more of the passes that only harm."""
    trainings = Trainings(quick=False, kept=Kept(write=False), tuned_on="one.txt")
    _, short = shortened(BUDGETS[0])
    trainings.make(trainings.tuning(short, RATES[0]))
    make_tuned(trainings, short, "one.txt", BUDGETS[0], SEEDS[0])
    found = [(c.train.steps, c.train.steps // c.train.eval_every) for c in fake.trained]
    whole = BUDGETS[0].tokens / 2048
    assert found == [(round(whole), 1), (round(short.share * whole), VALIDATIONS)]


@pytest.mark.parametrize(
    ("best", "tried"),
    [(RATES[0], RATES), (max(RATES), (*RATES, HIGHER)), (HIGHER, (*RATES, HIGHER))],
)
def test_a_higher_rate_is_tried_where_the_highest_is_best(
    fake: Fake, corpora: list[str], best: float, tried: tuple[float, ...]
) -> None:
    fake.ends = lambda config: (1.5 + abs(config.train.lr - best), 1.0)
    trainings = Trainings(quick=False, kept=Kept(write=False), tuned_on="one.txt")
    for lr in RATES:
        assert not trainings.is_tuned(CORPUS)
        assert trainings.rate(CORPUS) == RATES[0], "until all are tried"
        trainings.make(trainings.tuning(CORPUS, lr))
    assert trainings.is_tuned(CORPUS) == (len(tried) == len(RATES))
    _tune(trainings, CORPUS)
    assert tuple(c.train.lr for c in fake.trained) == tried
    assert (trainings.tried(CORPUS), trainings.rate(CORPUS)) == (len(tried), best)
    assert trainings.is_tuned(CORPUS)


@pytest.mark.parametrize(
    ("by_dropout", "best", "tried"),
    [
        ({0.0: (1.9, 1.0)}, 0.0, 1),
        ({0.0: (1.9, 0.6), 0.1: (1.8, 0.95), 0.2: (1.85, 1.0)}, 0.1, 3),
        ({0.0: (1.9, 0.6), 0.1: (1.95, 0.7)}, 0.0, 2),
        ({0.0: (1.9, 0.3), 0.1: (1.8, 0.4), 0.2: (1.7, 0.5), 0.3: (1.75, 0.8)}, 0.2, 4),
    ],
)
def test_dropout_is_tried_while_it_helps_and_learning_ends_early(
    fake: Fake,
    corpora: list[str],
    by_dropout: dict[float, tuple[float, float]],
    best: float,
    tried: int,
) -> None:
    """Judged once the series of the first seed has ended, by all seeds with the best of it."""
    budget, case = BUDGETS[0], NORMAL
    fake.ends = lambda config: by_dropout[config.model.residual_dropout]
    trainings = Trainings(quick=False, kept=Kept(write=False), tuned_on="one.txt")
    assert trainings.untried_dropout(case, "two.txt", budget) == 0.0
    make_tuned(trainings, case, "two.txt", budget, SEEDS[1])
    seen = [(c.train.seed, c.model.residual_dropout) for c in fake.trained]
    assert seen == [*((SEEDS[0], d) for d in DROPOUTS[:tried]), (SEEDS[1], best)]
    assert {c.model.embedding_dropout == c.model.residual_dropout for c in fake.trained} == {True}
    assert trainings.untried_dropout(case, "two.txt", budget) is None
    assert trainings.dropout(case, "two.txt", budget) == best
    assert trainings.bpbs(case, "two.txt", budget) == dict.fromkeys(SEEDS[:2], by_dropout[best][0])


def test_other_tables_begin_with_the_random_start_s_dropout(fake: Fake, corpora: list[str]) -> None:
    """What learns faster needs no less: what is below the random start's best is not trained."""
    ends = {
        "normal": {0.0: (1.9, 0.3), 0.1: (1.7, 0.95), 0.2: (1.8, 1.0)},
        "corpus": {0.1: (1.6, 0.8), 0.2: (1.55, 0.9)},
    }
    fake.ends = lambda config: ends[config.model.embedding.init][config.model.residual_dropout]
    trainings = Trainings(quick=False, kept=Kept(write=False), tuned_on="one.txt")
    for case in (NORMAL, RANK64):
        make_tuned(trainings, case, "two.txt", BUDGETS[1], SEEDS[1])
    seen = [(c.model.embedding.init, c.train.seed, c.model.residual_dropout) for c in fake.trained]
    first, second = SEEDS[:2]
    random = [("normal", first, dropout) for dropout in DROPOUTS[:3]]
    corpus = [("corpus", first, dropout) for dropout in DROPOUTS[1:3]]
    assert seen == [*random, ("normal", second, 0.1), *corpus, ("corpus", second, 0.2)]


def test_the_page_says_what_each_dropout_came_to(fake: Fake, corpora: list[str]) -> None:
    ends = {0.0: (1.9, 0.3), 0.1: (1.8, 0.95), 0.2: (1.81, 1.0)}
    fake.ends = lambda config: ends[config.model.residual_dropout]
    trainings = Trainings(quick=False, kept=Kept(write=False), tuned_on="one.txt")
    for budget in BUDGETS:
        make_tuned(trainings, NORMAL, "two.txt", budget, SEEDS[0])
    make_tuned(trainings, shortened(BUDGETS[1])[0], "two.txt", BUDGETS[1], SEEDS[0])
    first, second = _series(trainings, ["two.txt"])
    assert first.startswith("Dropouts tried on two.txt, 2.5 M tokens")
    assert first.endswith("): dense, normal: 0 1.900 at 30%, 0.1 1.800 at 95%, 0.2 1.810 at 100%.")
    assert "10 M" in second
    assert "corpus" not in second, "one was tried: nothing to compare"
    assert not _series(trainings, ["one.txt"])


def test_a_claim_waits_for_the_dropouts(
    whole: Callable[[], Trainings], fake: Fake, corpora: list[str]
) -> None:
    def ended_early(one: dict[str, Any]) -> dict[str, Any]:
        return one | {"best_at": 0.5} if one["table"] == "reduced 64" else one

    lines = map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
    put(*(json.dumps(ended_early(one)) for one in lines))
    claims = _Judge(whole(), "two.txt", BUDGETS[0]).claims(quick=False)
    assert [claim.name[:7] for claim in claims if not claim.judged] == ["rank 64"]


def test_without_time_nothing_is_tried(fake: Fake, corpora: list[str]) -> None:
    kept = Kept(write=False)
    trainings = Trainings(quick=False, kept=kept, tuned_on="one.txt", until=0.0)
    make_tuned(trainings, NORMAL, "two.txt", BUDGETS[0], SEEDS[1])
    assert not fake.trained


def test_the_first_rate_stands_until_all_were_tried(fake: Fake, corpora: list[str]) -> None:
    trainings = Trainings(quick=False, kept=Kept(write=False), tuned_on="one.txt")
    for lr in RATES[:2]:
        trainings.make(trainings.tuning(NORMAL, lr))
    assert (trainings.rate(NORMAL), trainings.tried(NORMAL)) == (RATES[0], 2)
    trainings.make(trainings.tuning(NORMAL, RATES[2]))
    assert (trainings.rate(NORMAL), trainings.tried(NORMAL)) == (BEST, 3)
    assert trainings.tried(CORPUS) == 0


def test_what_is_whole_is_judged_from_the_file_alone(
    whole: Callable[[], Trainings], fake: Fake, corpora: list[str]
) -> None:
    before = len(fake.trained)
    for corpus in corpora:
        judge = _Judge(whole(), corpus, BUDGETS[0])
        claims = judge.claims(quick=False)
        assert all(claim.judged and claim.value == 1.0 for claim in claims)
        row = judge.row(NORMAL)
        assert (row["lr"], row["lr tried"], row["seeds"]) == (BEST, len(RATES), len(SEEDS))
    assert len(fake.trained) == before


@pytest.mark.parametrize(
    ("drop", "whole_ones"),
    [
        (lambda one: one["start"] == "normal" and one["seed"] == 2, ["composed"]),
        (lambda one: one["start"] == "normal" and one["lr"] == RATES[2], ["composed"]),
        (
            lambda one: one["table"] == "composed" and one["lr"] == RATES[2],
            ["corpus start", "rank 64", "corpus start", "rank 32"],
        ),
    ],
)
def test_a_claim_that_is_not_whole_is_not_judged(
    whole: Callable[[], Trainings], drop: Callable[[dict[str, Any]], bool], whole_ones: list[str]
) -> None:
    without(drop)
    claims = _Judge(whole(), "one.txt", BUDGETS[0]).claims(quick=False)
    judged = [claim.name for claim in claims if claim.judged]
    assert len(judged) == len(whole_ones)
    assert all(map(str.startswith, judged, whole_ones))
    assert {claim.why for claim in claims if not claim.judged} == {UNMEASURED}


def test_the_page_says_on_which_machines(whole: Callable[[], Trainings]) -> None:
    trainings = whole()
    _Judge(trainings, "one.txt", BUDGETS[0]).claims(quick=False)
    [said] = [note for note in _notes(trainings) if note.startswith("Trainings")]
    assert f"Trainings: {len(trainings.used)}" in said
    one = next(iter(trainings.used.values()))
    assert f"{one.processor} (1 thread, fp32, torch {one.torch}" in said
