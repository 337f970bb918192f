"""The bench of token tables: it runs, keeps what it trained, and says what it has not measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cllm.bench import embed, embed_speed
from cllm.bench.embed import UNMEASURED, _headline, _Judge
from cllm.bench.embed_cases import (
    BUDGETS,
    COMPOSED,
    CORPUS,
    NORMAL,
    RANK64,
    RATES,
    Budget,
    Case,
    main_cases,
    other_cases,
    shortened,
    speed_cases,
)
from cllm.bench.embed_kept import Kept
from cllm.bench.embed_speed import Speed
from cllm.bench.embed_trainings import Trainings
from cllm.bench.harness import Options, render


@pytest.mark.slow
def test_a_quick_run_trains_and_judges_nothing(isolated: Path, corpus: Path) -> None:
    options = Options(quick=True, data=(str(corpus),))
    result = embed.run(options)
    assert [row["table"] for row in result.rows] == ["dense", "dense", "reduced 64"]
    assert all(row["bits per byte"] > 0 for row in result.rows)
    assert all(claim.holds is None for claim in result.claims)
    assert "too short to judge" in render(result)
    assert all(row["tokens/s"] > 0 for row in result.rows)
    assert [row["tokens/s over dense"] for row in result.rows][:2] == [1, 1]
    assert result.rows[2]["tokens/s over dense"] > 0
    # Kept: nothing is trained any more, whatever the time.
    again = embed.run(Options(quick=True, data=(str(corpus),), minutes=0))
    assert [row["bits per byte"] for row in again.rows] == [
        row["bits per byte"] for row in result.rows
    ]


def test_what_there_was_no_time_for_is_said(isolated: Path, corpus: Path) -> None:
    kept = Kept(write=False)
    trainings = Trainings(quick=False, kept=kept, until=0.0, tuned_on=str(corpus))
    judge = _Judge(trainings, str(corpus), BUDGETS[0])
    assert judge.row(NORMAL)["bits per byte"] is None
    claims = judge.claims(quick=False)
    assert all(claim.holds is None for claim in claims)
    assert {claim.why for claim in claims} == {UNMEASURED}


def test_the_headline_has_what_all_texts_have(
    isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {
        ("", "2.5 M"): [1.5, 1.7, 1.6],
        ("b.txt", "2.5 M"): [1.25] * 3,
        ("", "10 M"): [1.0] * 3,
        ("b.txt", "10 M"): [1.0] * 2,  # a seed is missing
    }

    def bpbs(self: Trainings, case: Case, corpus: str, budget: Budget) -> dict[int, float]:
        found = known[corpus, budget.name]
        return dict(enumerate(found)) if case in (NORMAL, shortened(budget)[0]) else {}

    monkeypatch.setattr(Trainings, "bpbs", bpbs)
    trainings = Trainings(quick=False, kept=Kept(write=False), tuned_on="")
    first, second = _headline(trainings, ["", "b.txt"])
    assert list(first.values()) == ["2.5 M", "random start", "1.600", "1.250"]
    assert list(second) == ["tokens", "token table", "built-in", "b.txt"]
    assert second["token table"] == "corpus start, 60% of the steps"


def test_rows_say_how_far_from_dense_they_are(
    isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same start, by the seeds that both have."""
    crystal = Case(name="dense", start="crystal")
    known = {
        NORMAL.start: {0: 2.0, 1: 3.0, 2: 2.0},
        CORPUS.start: {0: 1.0, 1: 1.5, 2: 1.0},
        crystal.start: {0: 2.2, 1: 3.0},
        COMPOSED.name: {0: 0.9, 1: 1.5},
        RANK64.name: {1: 1.5},
    }

    def bpbs(self: Trainings, case: Case, corpus: str, budget: Budget) -> dict[int, float]:
        return known[case.start if case.name == "dense" else case.name]

    monkeypatch.setattr(Trainings, "bpbs", bpbs)
    judge = _Judge(Trainings(quick=False, kept=Kept(write=False), tuned_on=""), "", BUDGETS[0])
    cases = (NORMAL, CORPUS, crystal, COMPOSED, RANK64)
    found = [judge.row(case)["over dense"] for case in cases]
    assert found == [None, None, "1.050 ± 0.050", "0.950 ± 0.050", None]


def test_all_cases_are_valid_and_see_the_same_tokens() -> None:
    for budget in BUDGETS:
        for case in [*main_cases(budget), *other_cases()]:
            config = case.config((), budget, RATES[0], 0, dtype="fp32", dropout=0.1, validations=20)
            seen = config.train.steps * config.train.batch_size * config.model.context
            assert abs(seen - case.share * budget.tokens) < 2048
            assert config.model.embedding.init == case.start
            assert 20 <= config.train.steps / config.train.eval_every < 21
            assert config.model.embedding_dropout == config.model.residual_dropout == 0.1


def test_every_table_has_a_speed() -> None:
    """Those that share one differ in their start and share alone."""
    timed = {case.name: case for case in speed_cases()}
    assert next(iter(timed.values())) == CORPUS
    for case in [*main_cases(BUDGETS[0]), *other_cases()]:
        assert replace(timed[case.name], start=case.start, share=case.share) == case


def test_ranks_are_to_be_no_slower_than_dense() -> None:
    found = {"reduced 64": Speed(120.0, 1.2), "reduced 32": Speed(99.0, 0.99)}
    assert [claim.holds for claim in embed_speed.claims(found, None)] == [True, False]
    assert [claim.value for claim in embed_speed.claims(found, None)] == [1.2, 0.99]
    assert all(claim.holds is None for claim in embed_speed.claims(found, "others are at work"))
    unmeasured = embed_speed.claims({}, "others are at work")
    assert [(claim.value, claim.why) for claim in unmeasured] == [(None, "others are at work")] * 2
