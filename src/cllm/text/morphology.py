"""Which tokens belong together though their merge trees differ: variants of a word, and its relatives.

Variants are the same but for a leading space and case: ``run``, ``' run'``, ``Run``. Relatives share a
stem: ``run``, ``runner``, ``running``. No list of a language's suffixes is used: an ending counts as one
where the vocabulary shows it after enough words, in the spirit of Goldsmith ("Unsupervised learning of
the morphology of a natural language", Computational Linguistics 2001). What changes in spelling when an
ending is added (``running``, ``making``, ``happiness``) follows English, and Porter ("An algorithm for
suffix stripping", Program 1980): it finds nothing in other languages and costs nothing there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from cllm.text.merge_tree import MergeTree

SHORTEST = 3
"""Letters of a stem that is a word."""
SHORTEST_BOUND = 4
"""Letters of a stem that is none, as ``educat`` in ``educate`` and ``education``."""
LONGEST_ENDING = 5
LEAST, SHARE = 5, 1000
"""An ending is one after this many words, and after one in so many of all words."""


@dataclass(frozen=True)
class Morphology:
    """Words of a vocabulary and what they come from.

    Attributes:
        keys: (V,) the key of each token; empty for what is no text.
        variants: the tokens of each key that has more than one, ascending.
        parents: word -> the word or stem that it comes from: ``runners`` -> ``runner`` -> ``run``.
        relatives: the tokens of each word or stem that others come from, ascending.
        models: for each token, without itself, the shortest token of its word, and of each word that its
            word comes from; none longer than the token in bytes. Lower case comes first among equals.
    """

    keys: tuple[str, ...]
    variants: dict[str, tuple[int, ...]]
    parents: dict[str, str]
    relatives: dict[str, tuple[int, ...]]
    models: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tree: MergeTree, *, stems: bool = True) -> Morphology:
        """The morphology of a tokenizer's vocabulary; without ``stems``, of its variants alone."""
        keys = tuple(word_key(tree.text(token) or "") for token in range(len(tree)))
        tokens = defaultdict[str, list[int]](list)
        for token, key in enumerate(keys):
            if key:
                tokens[key].append(token)
        words = {key for key in tokens if key.isalpha() and len(key) >= SHORTEST}
        parents = find_parents(words, find_endings(words)) if stems else {}
        descent = defaultdict[str, set[int]](set)
        for word in words:
            for ancestor in ancestors(word, parents):
                descent[ancestor].update(tokens[word])
        for stem in words & descent.keys():
            descent[stem].update(tokens[stem])
        return cls(
            keys=keys,
            variants={key: tuple(ids) for key, ids in tokens.items() if len(ids) > 1},
            parents=parents,
            relatives={stem: tuple(sorted(descent[stem])) for stem in sorted(descent)},
            models=tuple(_models(tree, keys, tokens, parents)),
        )


def _models(
    tree: MergeTree, keys: tuple[str, ...], tokens: dict[str, list[int]], parents: dict[str, str]
) -> Iterator[tuple[int, ...]]:
    def order(token: int) -> tuple[int, bool, int]:
        text = tree.text(token) or ""
        return len(tree.texts[token]), text != text.casefold(), token

    shortest = {key: min(ids, key=order) for key, ids in tokens.items()}
    for token, key in enumerate(keys):
        line = (key, *ancestors(key, parents)) if key else ()
        found = [shortest[word] for word in line if word in shortest]
        # Case folding can lengthen a text; that no model is longer is what makes codes unique.
        longest = len(tree.texts[token])
        yield tuple(i for i in found if i != token and len(tree.texts[i]) <= longest)


def word_key(text: str) -> str:
    """What variants share: the text without one leading space, case folded."""
    return text.removeprefix(" ").casefold()


def find_endings(words: Collection[str]) -> frozenset[str]:
    """Endings of at most ``LONGEST_ENDING`` letters that enough ``words`` have after another word."""
    seen = Counter[str]()
    for word in words:
        for cut in range(max(SHORTEST, len(word) - LONGEST_ENDING), len(word)):
            if any(form in words for form in spellings(word, cut)):
                seen[word[cut:]] += 1
    least = max(LEAST, len(words) / SHARE)
    return frozenset(ending for ending, count in seen.items() if count >= least)


def spellings(word: str, cut: int) -> Iterator[str]:
    """What ``word[:cut]`` may be when it stands alone, all shorter than the word: as it is, with the
    doubled consonant single, the dropped e, the y that became i."""
    stem = word[:cut]
    yield stem
    if cut > SHORTEST and stem[-1] == stem[-2]:
        yield stem[:-1]
    if cut + 1 < len(word):
        yield stem + "e"
    if stem[-1] == "i":
        yield stem[:-1] + "y"


def find_parents(words: Collection[str], endings: Collection[str]) -> dict[str, str]:
    """The longest word that each word is made from by one ending; failing that, the longest stem that
    is no word but carries endings in at least two words."""
    parents = dict[str, str]()
    stems = defaultdict[str, int](int)
    for word in words:
        for cut in range(len(word) - 1, SHORTEST - 1, -1):
            if word[cut:] not in endings:
                continue
            stems[word[:cut]] += 1
            if word not in parents:
                known = next((form for form in spellings(word, cut) if form in words), None)
                if known is not None:
                    parents[word] = known
    for word in words:
        for cut in range(len(word) - 1, SHORTEST_BOUND - 1, -1):
            stem = word[:cut]
            if word in parents or stem in words or word[cut:] not in endings:
                continue
            if stems[stem] > 1:
                parents[word] = stem
    return parents


def ancestors(word: str, parents: dict[str, str]) -> Iterator[str]:
    """Parent, grandparent, … of a word; each is shorter than the one before."""
    while word in parents:
        word = parents[word]
        yield word
