"""From sources to a data set, and from another text to tokens for evaluation.

Each step passes over a temporary spool of the decoded text, so memory does not grow with the corpus.
A prepared directory is keyed by what the sources contain and by every setting that matters: the same
request finds it again, another one never does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers

from cllm.core.atomic import clear_errors, new_directory
from cllm.core.config import DataConfig, TokenizerConfig
from cllm.core.errors import UsageError, UserError
from cllm.text.build import Request, build, train_tokenizer
from cllm.text.dataset import (
    FORMAT,
    SPLITS,
    Dataset,
    load_prepared,
    prepared_key,
    tokens_key,
)
from cllm.text.fingerprint import Fingerprint
from cllm.text.lengths import refuse_short
from cllm.text.notes import Notes
from cllm.text.packed import PackedTokens
from cllm.text.packing import pack_segments
from cllm.text.reading import spooled
from cllm.text.sources import expand
from cllm.text.splits import whole_corpus
from cllm.text.tokenizer import Tokenizer


def _quiet(line: str) -> None:
    """Say nothing."""


def _no_progress(stage: str, share: float) -> None:
    """Show nothing."""


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    directory: str | Path,
    *,
    seed: int,
    context: int,
    reuse: Tokenizer | None = None,
    cache: str | Path | None = None,
    say: Callable[[str], None] = _quiet,
    progress: Callable[[str, float], None] | None = None,
) -> Dataset:
    """Make ``directory`` hold the packed splits of the text that ``data`` names, and open it.

    ``reuse`` takes a tokenizer as it is (a run that goes on from another); else ``tokenizer.file`` or
    one trained on the training split. ``context`` is the shortest that each split must be, in tokens.
    With the directory ``cache``, what was prepared once for the same content and settings is copied
    from there. ``say`` gets lines for people, ``progress`` a stage's name and the share of it done.

    The directory appears whole or not at all; older prepared data in it are replaced. Raises
    ``UserError`` for text that is missing, empty, binary, undecodable or too short, and for a place
    that cannot be written or holds something else.
    """
    directory = Path(directory)
    sources = expand(data.paths)
    given = reuse or (Tokenizer.load(tokenizer.file) if tokenizer.file else None)
    if tokenizer.file and not reuse and tokenizer.order not in ("auto", "tokenizer"):
        raise UsageError(
            f"tokenizer.order = {tokenizer.order!r} numbers the ids of a tokenizer that is trained, and "
            "one that is given keeps its own: leave it out"
        )
    prints = [source.fingerprint() for source in sources]
    key = _request_key(prints, data, tokenizer, given, seed)
    kept = Path(cache) / key[:32] if cache is not None else None
    if prepared_key(directory) == key:
        say(f"data: prepared before in {directory}")
    elif kept is not None and prepared_key(kept) == key:
        say(f"data: prepared before in {kept}")
        _copy(kept, directory)
    else:
        request = Request(data, tokenizer, given, seed, context, progress or _no_progress)
        _make_room(directory)
        with new_directory(directory) as draft:
            build(request, sources, prints, key, draft)
        if kept is not None:
            try:
                _copy(directory, kept)
            except UserError as error:  # a cache only saves time: what cannot be kept is made again
                say(f"data: not kept for other runs ({error})")
    dataset = load_prepared(directory)
    for name in SPLITS:  # what was prepared before may have been for a shorter context
        tokens: PackedTokens | None = getattr(dataset, name)
        if tokens is not None:
            refuse_short(name, tokens.header, dataset.report.bytes, context)
    for line in dataset.report.lines():
        say(line)
    return dataset


def tokens_for_eval(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    field: str = "text",
    progress: Callable[[str, float], None] | None = None,
) -> PackedTokens:
    """All of another text, unsplit, as one packed file in ``directory`` (an existing one, which the
    caller removes), made by ``tokenizer``. Raises ``UserError`` as ``prepare`` does."""
    directory, show = Path(directory), progress or _no_progress
    sources, notes = expand(paths), Notes()
    with spooled(sources, field, directory, notes, lambda s: show("reading", s)) as spool:
        key = tokens_key(spool.sha256, tokenizer)
        path = directory / f"eval-{key[:16]}.tokens"
        header = pack_segments(
            spool, whole_corpus(spool), tokenizer, path, key, lambda s: show("encoding", s)
        )
        refuse_short("evaluation", header, spool.size, 1)
    return PackedTokens.open(path, key=key)


def tokenizer_from(
    paths: Sequence[str],
    settings: TokenizerConfig,
    directory: str | Path,
    *,
    field: str = "text",
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[Tokenizer, int]:
    """A tokenizer trained on a sample of all the text that ``paths`` name, and the sample's bytes.

    ``directory``, an existing one, holds temporary files of the text's size meanwhile. Raises
    ``UserError`` as ``prepare`` does.
    """
    show = progress or _no_progress
    notes, place = Notes(), Path(directory)
    with spooled(expand(paths), field, place, notes, lambda s: show("reading", s)) as spool:
        return train_tokenizer(
            spool, whole_corpus(spool), settings, seed, lambda s: show("tokenizer", s)
        )


def _request_key(
    prints: Sequence[Fingerprint],
    data: DataConfig,
    tokenizer: TokenizerConfig,
    given: Tokenizer | None,
    seed: int,
) -> str:
    """SHA-256 (hex) of all that the prepared files depend on."""
    settings = data.model_dump(mode="json", exclude={"paths"})
    # A tokenizer that is trained depends on its settings and on the trainer; a given one is itself.
    words = given.sha256 if given else [tokenizer.model_dump(mode="json"), tokenizers.__version__]
    content = [FORMAT, [(p.name, p.size, p.sha256) for p in prints], settings, words, seed]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def _make_room(directory: Path) -> None:
    """Make the parents of ``directory``; refuse a place that holds anything but prepared data."""
    with clear_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        foreign = directory.is_dir() and any(directory.iterdir())
    if foreign and prepared_key(directory) is None:
        raise UserError(f"{directory} holds other files; choose an empty or a new directory")


def _copy(source: Path, target: Path) -> None:
    """Copy a prepared directory, atomically."""
    _make_room(target)
    with new_directory(target) as draft:
        for path in sorted(source.iterdir()):
            shutil.copyfile(path, draft / path.name)
