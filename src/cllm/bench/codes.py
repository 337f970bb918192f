"""``cllm bench codes``: do codes of tokens find a word's relatives, beside simpler measures?"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cllm.bench.harness import Claim, Options, Result, load_now
from cllm.core.config import DataConfig, TokenizerConfig
from cllm.lattice.similarity import gcd_over_max
from cllm.text.corpus import prepare
from cllm.text.counts import count_tokens
from cllm.text.families import FamilyScore, score_families, word_families
from cllm.text.merge_tree import MergeTree
from cllm.text.morphology import Morphology
from cllm.text.token_codes import TokenCodes

TAKES = frozenset({"data"})
VOCABULARIES = (4096, 16384)
NEAREST = 10
OURS, TREE, TRIGRAMS = "codes", "merge tree alone", "character trigrams, Jaccard"

Measure = Callable[[np.ndarray], np.ndarray]
"""Token ids (n,) -> how near all tokens are (n, V)."""


def run(options: Options) -> Result:
    """Score on the built-in corpus and on each text of ``--data``, each with its own tokenizers.

    ``quick``: on the last of them, with the smaller vocabulary.
    """
    load, rows = load_now(), list[dict[str, Any]]()
    texts = [("built-in", ()), *((Path(path).name, (path,)) for path in options.data)]
    if options.quick:
        texts = texts[-1:]
    for name, paths in texts:
        for size in VOCABULARIES[:1] if options.quick else VOCABULARIES:
            rows += [{"text": name, "vocabulary": size} | row for row in _score(paths, size)]
    claims = [
        _claim("recall@10", TREE, rows),
        _claim("MRR", TREE, rows),
        _claim("MRR", TRIGRAMS, rows),
    ]
    if options.quick:
        claims = [
            replace(claim, judged=False, why="quick: too little to judge") for claim in claims
        ]
    return Result(
        bench="codes",
        rows=rows,
        claims=claims,
        notes=[
            "Word families are our own list. The rules for endings were chosen on every second family;"
            " scored are the others, those with two words or more that are single tokens. They are not"
            " blind: their scores had been seen before the codes took their last form.",
            "recall@10: share of the ordered pairs of relatives where one is among the 10 words nearest"
            " to the other; MRR: 1 / rank of the nearest relative, the mean over words.",
            "Seconds are of building tree, words and codes from a tokenizer and counts, once.",
        ],
        packages=("numpy", "scipy", "tokenizers"),
        load_before=load,
    )


def _claim(figure: str, peer: str, rows: list[dict[str, Any]]) -> Claim:
    """The codes' ``figure`` less that of ``peer``, where that is least."""
    ours, theirs = (
        [row[figure] for row in rows if row["method"] == method] for method in (OURS, peer)
    )
    gains = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    name = f"{figure} of the codes less that of: {peer} (least of all texts and vocabularies)"
    return Claim(name=name, value=float(min(gains)), required=0.0)


def _score(paths: tuple[str, ...], size: int) -> Iterator[dict[str, Any]]:
    """A row for each method, on one text and vocabulary."""
    with tempfile.TemporaryDirectory() as place:
        data, settings = DataConfig(paths=paths), TokenizerConfig(vocab_size=size)
        dataset = prepare(data, settings, Path(place) / "data", seed=0, context=64)
        counts = count_tokens(dataset.train, dataset.tokenizer.vocab_size)
        tokenizer = dataset.tokenizer
        del dataset  # no file may be open when its directory goes (Windows)
    start = time.perf_counter()
    tree = MergeTree.from_tokenizer(tokenizer)
    words = Morphology.of(tree)
    codes = TokenCodes.build(tree, counts, words)
    seconds = time.perf_counter() - start
    spaced = sorted(range(len(tree)), key=lambda i: (not tree.texts[i].startswith(b" "), i))
    for method, measure in _measures(tree, words, codes).items():
        found = score_families(measure, words.keys, word_families()[1::2], first=spaced, k=NEAREST)
        yield _row(method, found, seconds if method == OURS else None)


def _row(method: str, found: FamilyScore, seconds: float | None) -> dict[str, Any]:
    return {
        "families": found.families,
        "words": found.words,
        "method": method,
        "recall@10": round(found.recall, 3),
        "MRR": round(found.reciprocal_rank, 3),
        "seconds": None if seconds is None else round(seconds, 2),
    }


def _measures(tree: MergeTree, words: Morphology, codes: TokenCodes) -> dict[str, Measure]:
    """The methods: ours, its parts, the older system's measure, and character trigrams."""
    variants = TokenCodes.build(tree, codes.counts, Morphology.of(tree, stems=False))
    bare = TokenCodes.build(tree, codes.counts, Morphology(words.keys, {}, {}, {}, ()))
    trigrams = _trigrams(words.keys)
    return {
        OURS: codes.similarities,
        "codes without stems": variants.similarities,
        TREE: bare.similarities,
        "merge tree, gcd/max (older system)": lambda ids: gcd_over_max(
            bare.codes.take(ids), bare.codes
        ),
        TRIGRAMS: lambda ids: _jaccard(trigrams, ids),
    }


def _trigrams(keys: tuple[str, ...]) -> Any:
    """(V, n) sparse 0/1: the trigrams of each key, with its ends marked."""
    from scipy.sparse import csr_matrix

    number = dict[str, int]()
    rows, columns = list[int](), list[int]()
    for row, key in enumerate(keys):
        marked = f"<{key}>"
        for gram in {marked[i : i + 3] for i in range(len(marked) - 2)}:
            rows.append(row)
            columns.append(number.setdefault(gram, len(number)))
    shape = (len(keys), len(number))
    return csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)


def _jaccard(grams: Any, ids: np.ndarray) -> np.ndarray:
    sizes = np.asarray(grams.sum(axis=1)).ravel()
    shared: np.ndarray = (grams[ids] @ grams.T).toarray()
    return shared / np.maximum(sizes[ids][:, None] + sizes - shared, 1)
