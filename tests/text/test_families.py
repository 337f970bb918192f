"""The score of a similarity against word families, and of the codes on real texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cllm.bench.codes import run
from cllm.bench.harness import Options, render
from cllm.text.families import score_families, word_families

KEYS = ("run", "run", "runs", "runner", "tree", "trees", "", "x")
FAMILIES = [("run", "runs", "runner"), ("tree", "trees"), ("go", "goes"), ("x", "y")]


def test_our_list_is_well_formed() -> None:
    families = word_families()
    assert len(families) > 100
    for family in families:
        assert len(family) == len(set(family)) > 1
        assert all(word == word.casefold() and word.isalpha() for word in family)
    assert len(set(families)) == len(families)


def test_a_perfect_measure_and_a_blind_one() -> None:
    def perfect(ids: np.ndarray) -> np.ndarray:
        stems = np.array([key[:3] for key in KEYS])
        return (stems[ids][:, None] == stems).astype(float)

    best = score_families(perfect, KEYS, FAMILIES, k=2)
    assert (best.families, best.words) == (2, 5)
    assert best.recall == 1
    # Of two relatives equally near, each has rank 1.5.
    assert best.reciprocal_rank == pytest.approx((3 / 1.5 + 2) / 5)
    blind = score_families(lambda ids: np.zeros((len(ids), len(KEYS))), KEYS, FAMILIES, k=2)
    assert blind.recall == 0
    assert blind.reciprocal_rank == pytest.approx(1 / 3), "the mean rank of five others"


def test_a_word_is_as_near_as_its_nearest_variant_and_asks_by_the_first() -> None:
    near = np.zeros((8, 8))
    near[2, 1] = 1  # runs -> the second token of run
    near[1, 3] = 1  # only the second token of run finds runner

    def measure(ids: np.ndarray) -> np.ndarray:
        return near[ids] + np.linspace(0, 0.1, 8)[::-1]

    family = [("run", "runs", "runner")]
    plain = score_families(measure, KEYS, family, k=1)
    turned = score_families(measure, KEYS, family, first=range(7, -1, -1), k=1)
    assert plain.recall == pytest.approx(3 / 6)
    assert turned.recall == pytest.approx(3 / 6)
    assert score_families(measure, KEYS, [("run", "runner")], k=1).recall == 0.5
    assert score_families(measure, KEYS, [("run", "runner")], first=[1, *range(8)], k=1).recall == 1


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="larger vocabulary"):
        score_families(lambda ids: ids, KEYS, [("go", "goes")])


def test_bench_scores_every_method_and_judges_nothing_when_quick(tmp_path: Path) -> None:
    text = tmp_path / "families.txt"
    words = [word for family in word_families() for word in family]
    draw = np.random.default_rng(0)
    lines = (" ".join(draw.choice(words, 12)) + "." for _ in range(2000))
    text.write_text("\n".join(lines), encoding="utf-8")
    result = run(Options(quick=True, data=(str(text),)))
    assert all(claim.holds is None for claim in result.claims)
    assert "quick" in render(result)
    scores = {row["method"]: row for row in result.rows}
    assert len(scores) == len(result.rows) == 5
    assert {(row["text"], row["words"]) for row in result.rows} == {
        ("families.txt", scores["codes"]["words"])
    }
    assert scores["codes"]["words"] > 200
    assert scores["codes"]["MRR"] > scores["merge tree alone"]["MRR"]
    assert all(0 < row["recall@10"] <= 1 and 0 < row["MRR"] <= 1 for row in result.rows)


def test_codes_find_relatives_nearer_than_the_merge_tree_alone(real_data: Path) -> None:
    result = run(Options(quick=True, data=(str(real_data / "state_union.txt"),)))
    scores = {row["method"]: row for row in result.rows}
    assert scores["codes"]["words"] > 50
    assert scores["codes"]["MRR"] > scores["merge tree alone"]["MRR"]
