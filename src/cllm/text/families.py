"""Scoring a similarity of tokens against word families: does it find the relatives of a word?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

Family = tuple[str, ...]


@dataclass(frozen=True)
class FamilyScore:
    """How well relatives are found.

    Attributes:
        families: those with at least two words that are single tokens; the rest say nothing.
        words: the words of those families that are single tokens.
        recall: share of the ordered pairs (word, relative) where the relative is among the ``k`` words
            nearest to the word.
        reciprocal_rank: 1 / rank of the nearest relative, the mean over words.
    """

    families: int
    words: int
    recall: float
    reciprocal_rank: float


def word_families() -> list[Family]:
    """Our list of English word families."""
    text = resources.files("cllm.text").joinpath("word_families.txt").read_text(encoding="utf-8")
    return [tuple(line.split()) for line in text.splitlines() if line and line[0] != "#"]


def score_families(
    similarities: Callable[[np.ndarray], np.ndarray],
    keys: Sequence[str],
    families: Sequence[Family],
    *,
    first: Sequence[int] | None = None,
    k: int = 10,
) -> FamilyScore:
    """Score ``similarities``: token ids (n,) -> (n, V), larger is nearer; it is
    asked once, for all words.

    ``keys`` (V,) name the word of each token; tokens of one key are one word, as near as its nearest
    token, so that variants neither help nor hinder. A word asks by the token of its key that comes
    first in ``first`` (an order of the ids; by id if it is not given). Words that are equally near share
    the mean of their ranks.

    Raises:
        ValueError: no family has two words among the tokens.
    """
    order = range(len(keys)) if first is None else first
    asking = dict[str, int]()
    for token in order:
        asking.setdefault(keys[token], token)
    asking.pop("", None)
    known = [[word for word in family if word in asking] for family in families]
    known = [family for family in known if len(family) > 1]
    if not known:
        raise ValueError(
            "no family has two words that are single tokens; take a larger vocabulary or other text"
        )
    words = list(asking)
    place = {word: number for number, word in enumerate(words)}
    tokens = np.array([token for token, key in enumerate(keys) if key])
    columns = np.array([place[keys[token]] for token in tokens])
    rows = similarities(np.array([asking[word] for family in known for word in family]))
    ranks, firsts = list[np.ndarray](), list[float]()
    for family in known:
        here = [place[word] for word in family]
        for number, found in enumerate(rows[: len(family), tokens]):
            near = np.full(len(words), -np.inf)
            np.maximum.at(near, columns, found)
            near[here[number]] = -np.inf  # itself is no answer
            ranks.append(_ranks(near, here[:number] + here[number + 1 :]))
            firsts.append(1 / float(ranks[-1].min()))
        rows = rows[len(family) :]
    return FamilyScore(
        families=len(known),
        words=len(firsts),
        recall=float((np.concatenate(ranks) <= k).mean()),
        reciprocal_rank=float(np.mean(firsts)),
    )


def _ranks(row: np.ndarray, columns: list[int]) -> np.ndarray:
    """Ranks (from 1, ties share their mean) of some entries of a row, the largest first."""
    values = row[columns][:, None]
    return 1 + (row > values).sum(axis=1) + ((row == values).sum(axis=1) - 1) / 2
