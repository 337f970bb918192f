"""From sources to a data set: read, split, look for duplicates, train the tokenizer, pack.

Each step passes over a temporary spool of the decoded text, so memory does not grow with the corpus.
A prepared directory is keyed by what the sources contain and by every setting that matters: the same
request finds it again, another one never does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import tokenizers

from cllm.core.config import DataConfig, TokenizerConfig
from cllm.core.errors import UserError
from cllm.text.atomic import readable_errors
from cllm.text.dataset import (
    FORMAT,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Dataset,
    load_prepared,
    packed_path,
    prepared_key,
    tokens_key,
    write_manifest,
)
from cllm.text.duplicates import remove_duplicates
from cllm.text.fingerprint import Fingerprint
from cllm.text.notes import Notes
from cllm.text.packed import Header, PackedTokens
from cllm.text.packing import pack_segments
from cllm.text.pieces import sample
from cllm.text.report import CorpusReport, DuplicateReport, SplitReport
from cllm.text.sources import Source, expand
from cllm.text.splits import Splits, segment_bytes, split_corpus
from cllm.text.spool import Spool
from cllm.text.tokenizer import Tokenizer

Say = Callable[[str], None]
Progress = Callable[[str, float], None]
_SOURCES_LISTED = 100


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
    say: Say = _quiet,
    progress: Progress | None = None,
) -> Dataset:
    """Make ``directory`` hold the packed splits of the text that ``data`` names, and open it.

    ``reuse`` takes a tokenizer as it is (a run that goes on from another); else ``tokenizer.file`` or
    one trained on the training split. ``context`` is the shortest that each split must be, in tokens.
    With ``cache``, what was prepared once for the same content and settings is copied from there.
    ``say`` gets lines for people, ``progress`` a stage's name and the share of it that is done.

    Raises ``UserError`` for text that is missing, empty, binary, undecodable or too short, and for a
    place that cannot be written; what this call wrote is then removed.
    """
    directory = Path(directory)
    sources = expand(data.paths)
    given = reuse or (Tokenizer.load(tokenizer.file) if tokenizer.file else None)
    prints = [source.fingerprint() for source in sources]
    key = _request_key(prints, data, tokenizer, given, seed)
    if prepared_key(directory) == key:
        say(f"data: prepared before in {directory}")
        return _long_enough(load_prepared(directory), context)
    kept = Path(cache) / key[:32] if cache is not None else None
    if kept is not None and prepared_key(kept) == key:
        say(f"data: prepared before in {kept}")
        with _whole(directory):
            _copy(kept, directory)
        return _long_enough(load_prepared(directory), context)
    with _whole(directory):
        request = _Request(data, tokenizer, seed, context, given, say, progress or _no_progress)
        _build(request, sources, prints, key, directory)
        dataset = load_prepared(directory)
        if kept is not None:
            with _whole(kept):
                _copy(directory, kept)
    for line in dataset.report.lines():
        say(line)
    return dataset


def tokens_for_eval(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    field: str = "text",
    progress: Progress | None = None,
) -> PackedTokens:
    """All of another text as one packed file in ``directory`` (which the caller removes), tokenized
    by ``tokenizer``. Raises ``UserError`` as ``prepare`` does."""
    directory, show = Path(directory), progress or _no_progress
    sources = expand(paths)
    with _made(directory), spooled(sources, field, directory, Notes(), show) as spool:
        everything = np.stack([np.arange(spool.documents), spool.ends[:-1], spool.ends[1:]], axis=1)
        key = tokens_key(spool.sha256, tokenizer)
        path = directory / f"eval-{key[:16]}.tokens"
        pack_segments(spool, everything, tokenizer, path, key, lambda s: show("encoding", s))
    return PackedTokens.open(path, key=key)


@contextmanager
def spooled(
    sources: Sequence[Source], field: str, directory: Path, notes: Notes, show: Progress
) -> Iterator[Spool]:
    """All documents of the sources in a frozen spool, in temporary files of ``directory``.

    Raises ``UserError`` listing every file that cannot be decoded, or if there is no text at all.
    """
    with (
        readable_errors(f"temporary files in {directory}"),
        tempfile.TemporaryFile(dir=directory) as texts,
        tempfile.TemporaryFile(dir=directory) as names,
    ):
        spool = Spool(texts, names)
        for number, source in enumerate(sources):
            show("reading", number / len(sources))
            for document in source.documents(field, notes):
                if not notes.problems:  # else only look for what further files are broken
                    spool.add(document)
        show("reading", 1.0)
        notes.raise_problems()
        if not spool.bytes:
            where = ", ".join(source.name for source in sources[:3])
            raise UserError(f"there is no text in {where}{' …' * (len(sources) > 3)}")
        spool.freeze()
        yield spool


class _Request:
    """The arguments of one ``prepare`` that its steps share."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: TokenizerConfig,
        seed: int,
        context: int,
        given: Tokenizer | None,
        say: Say,
        show: Progress,
    ) -> None:
        self.data, self.tokenizer, self.seed, self.context = data, tokenizer, seed, context
        self.given, self.say, self.show = given, say, show


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


def _build(
    request: _Request,
    sources: Sequence[Source],
    prints: Sequence[Fingerprint],
    key: str,
    directory: Path,
) -> None:
    """Write tokenizer, splits and manifest into ``directory``."""
    notes = Notes()
    with spooled(sources, request.data.field, directory, notes, request.show) as spool:
        splits, duplicates = _split(request, spool)
        tokenizer, sampled = _tokenizer(request, spool, splits)
        tokenizer.save(directory / TOKENIZER)
        headers = _pack(request, spool, splits, tokenizer, tokens_key(key, tokenizer), directory)
        report = CorpusReport(
            sources=tuple(
                {"name": p.name, "bytes": p.size, "sha256": p.sha256}
                for p in prints[:_SOURCES_LISTED]
            ),
            source_count=len(prints),
            sha256=spool.sha256,
            bytes=spool.bytes,
            documents=spool.documents,
            split=splits.method,
            splits={name: _split_report(header) for name, header in headers.items()},
            bytes_per_token=_ratio(headers.values()),
            vocab_asked=None if request.given else request.tokenizer.vocab_size,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            sample_bytes=sampled,
            duplicates=duplicates,
            notes=notes.lines(),
        )
    write_manifest(directory, key, report)


def _split(request: _Request, spool: Spool) -> tuple[Splits, DuplicateReport]:
    data = request.data
    splits = split_corpus(
        spool,
        validation=data.validation,
        test=data.test,
        method=data.split,
        seed=request.seed,
    )
    splits, found = remove_duplicates(
        spool, splits, data.near_duplicates, request.seed, lambda s: request.show("duplicates", s)
    )
    # No text gives more tokens than bytes: what is hopeless is refused before the work is done.
    for name, table in splits.items():
        most = segment_bytes(table) + len(table)
        if (name == "train" or len(table)) and most < request.context:
            raise _too_short(name, segment_bytes(table), spool.bytes, 1.0, request.context)
    return splits, found


def _tokenizer(request: _Request, spool: Spool, splits: Splits) -> tuple[Tokenizer, int]:
    """The given tokenizer, or one trained on a sample of the training split, and the sample's bytes."""
    if request.given:
        return request.given, 0
    settings = request.tokenizer
    total = min(settings.sample_bytes, segment_bytes(splits.train))
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for text in sample(spool, splits.train, settings.sample_bytes, request.seed):
            read += len(text.encode("utf-8"))
            request.show("tokenizer", read / max(1, total))
            yield text

    return Tokenizer.train(texts(), settings.vocab_size, settings.special_tokens), read


def _pack(
    request: _Request,
    spool: Spool,
    splits: Splits,
    tokenizer: Tokenizer,
    key: str,
    directory: Path,
) -> dict[str, Header]:
    """Write the packed files; the headers of the splits that are not empty."""
    headers = {}
    for name, table in splits.items():
        path = packed_path(directory, name)
        if not len(table):
            path.unlink(missing_ok=True)
            continue
        stage = f"encoding {name}"
        pack_segments(
            spool, table, tokenizer, path, key, lambda s, stage=stage: request.show(stage, s)
        )
        header = PackedTokens.open(path, key=key, verify=False).header
        _check_length(name, header, spool.bytes, request.context)
        headers[name] = header
    return headers


def _split_report(header: Header) -> SplitReport:
    return SplitReport(
        segments=header.documents,
        bytes=header.text_bytes,
        tokens=header.tokens,
        scored_bytes=header.scored_bytes,
        scored_tokens=header.scored_tokens,
        bytes_per_token=_ratio([header]),
    )


def _ratio(headers: Sequence[Header] | object) -> float:
    """Bytes of text per token of text (end tokens left out)."""
    listed = list(headers)  # type: ignore[call-overload]
    text_tokens = sum(h.tokens - h.documents - 1 for h in listed)
    return sum(h.text_bytes for h in listed) / max(1, text_tokens)


def _check_length(name: str, header: Header, corpus_bytes: int, context: int) -> None:
    if header.tokens - 1 < context:
        per_token = header.text_bytes / (header.tokens - 1)
        raise _too_short(name, header.text_bytes, corpus_bytes, per_token, context)
    if not header.scored_tokens:
        raise UserError(f"the loss counts on nothing in {name}: its records have no answers")


def _too_short(name: str, here: int, corpus: int, per_token: float, context: int) -> UserError:
    needed = round(context * per_token)
    whole = round(needed * corpus / max(1, here))
    return UserError(
        f"the corpus is too short: {corpus:,} bytes leave {here:,} for {name}, and one context of "
        f"{context:,} tokens takes about {needed:,} (some {whole:,} bytes of corpus); give more text, "
        f"lower model.context{'' if name == 'train' else f', or raise data.{name}'}"
    )


def _long_enough(dataset: Dataset, context: int) -> Dataset:
    """Check data that were prepared for another context."""
    for name in SPLITS:
        tokens: PackedTokens | None = getattr(dataset, name)
        if tokens is not None:
            _check_length(name, tokens.header, dataset.report.bytes, context)
    return dataset


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    """``directory``, with its parents; those made here are removed again if the block fails."""
    made = list[Path]()
    here = directory
    while not here.exists():
        made.append(here)
        here = here.parent
    with readable_errors(str(directory)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            yield
        except BaseException:
            for path in made:
                with suppress(OSError):
                    path.rmdir()
            raise


@contextmanager
def _whole(directory: Path) -> Iterator[None]:
    """As ``_made``, for a block that prepares ``directory``: if it fails, its files go too.

    The manifest goes first in any case: a kill leaves files that nothing takes for prepared data.
    """
    names = [MANIFEST, TOKENIZER, *(packed_path(directory, name).name for name in SPLITS)]
    with _made(directory):
        (directory / MANIFEST).unlink(missing_ok=True)
        try:
            yield
        except BaseException:
            for name in names:
                with suppress(OSError):
                    (directory / name).unlink()
            raise


def _copy(source: Path, target: Path) -> None:
    """Copy prepared files, the manifest last."""
    present = [packed_path(source, name).name for name in SPLITS]
    for name in [TOKENIZER, *present, MANIFEST]:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)
