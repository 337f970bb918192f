"""The steps of ``prepare``: split, look for duplicates, train the tokenizer, pack, report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cllm.core.config import DataConfig, TokenizerConfig
from cllm.text.dataset import TOKENIZER, packed_path, tokens_key, write_manifest
from cllm.text.duplicates import remove_duplicates
from cllm.text.fingerprint import Fingerprint
from cllm.text.layout import chosen_order, laid_out
from cllm.text.lengths import refuse_hopeless, refuse_short
from cllm.text.notes import Notes
from cllm.text.packed import Header
from cllm.text.packing import pack_segments
from cllm.text.pieces import sample
from cllm.text.reading import spooled
from cllm.text.report import CorpusReport, DuplicateReport, SplitReport
from cllm.text.sources import Source
from cllm.text.splits import Splits, segment_bytes, split_corpus
from cllm.text.spool import Spool
from cllm.text.tokenizer import Tokenizer

_SOURCES_LISTED = 100


@dataclass(frozen=True)
class Request:
    """What ``prepare`` was asked for."""

    data: DataConfig
    tokenizer: TokenizerConfig
    given: Tokenizer | None
    """The tokenizer to use, if one was given."""
    seed: int
    context: int
    show: Callable[[str, float], None]
    """Gets the name of a stage and the share of it that is done."""

    def stage(self, name: str) -> Callable[[float], None]:
        """``show`` for one stage."""
        return functools.partial(self.show, name)


def build(
    request: Request,
    sources: Sequence[Source],
    prints: Sequence[Fingerprint],
    key: str,
    directory: Path,
) -> None:
    """Write tokenizer, packed splits and manifest of ``sources`` into an empty ``directory``."""
    notes = Notes()
    reading = request.stage("reading")
    with spooled(sources, request.data.field, directory, notes, reading) as spool:
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
            bytes=spool.size,
            documents=spool.documents,
            split=splits.method,
            splits={name: _split_report(header) for name, header in headers.items()},
            bytes_per_token=_bytes_per_token(headers.values()),
            vocab_asked=None if request.given else request.tokenizer.vocab_size,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            sample_bytes=sampled,
            duplicates=duplicates,
            notes=notes.lines(),
        )
    write_manifest(directory, key, report)


def _split(request: Request, spool: Spool) -> tuple[Splits, DuplicateReport]:
    data = request.data
    splits = split_corpus(
        spool,
        validation=data.validation,
        test=data.test,
        method=data.split,
        seed=request.seed,
    )
    splits, found = remove_duplicates(
        spool, splits, data.near_duplicates, request.seed, request.stage("duplicates")
    )
    refuse_hopeless(splits, spool.size, request.context)
    return splits, found


def _tokenizer(request: Request, spool: Spool, splits: Splits) -> tuple[Tokenizer, int]:
    if request.given:
        return request.given, 0
    show = request.stage("tokenizer")
    return train_tokenizer(spool, splits.train, request.tokenizer, request.seed, show)


def train_tokenizer(
    spool: Spool,
    segments: np.ndarray,
    settings: TokenizerConfig,
    seed: int,
    progress: Callable[[float], None],
) -> tuple[Tokenizer, int]:
    """A tokenizer trained on a sample of the segments, its ids in the order that ``settings`` ask
    for, and the sample's bytes."""
    order = chosen_order(settings.order, settings.vocab_size)
    passes = 1 if order == "tokenizer" else 2
    total = passes * min(settings.sample_bytes, segment_bytes(segments))
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for data in sample(spool, segments, settings.sample_bytes, seed):
            read += len(data)
            progress(read / max(1, total))
            yield data.decode("utf-8")

    tokenizer = Tokenizer.train(texts(), settings.vocab_size, settings.special_tokens)
    if passes == 2:
        tokenizer = laid_out(tokenizer, order, texts(), seed)
    return tokenizer, read // passes


def _pack(
    request: Request,
    spool: Spool,
    splits: Splits,
    tokenizer: Tokenizer,
    key: str,
    directory: Path,
) -> dict[str, Header]:
    """Write the packed files; the headers of the splits that are not empty."""
    headers = dict[str, Header]()
    for name, table in splits.items():
        if len(table):
            show = request.stage(f"encoding {name}")
            header = pack_segments(spool, table, tokenizer, packed_path(directory, name), key, show)
            refuse_short(name, header, spool.size, request.context)
            headers[name] = header
    return headers


def _split_report(header: Header) -> SplitReport:
    return SplitReport(
        segments=header.documents,
        bytes=header.text_bytes,
        tokens=header.tokens,
        scored_bytes=header.scored_bytes,
        scored_tokens=header.scored_tokens,
        bytes_per_token=_bytes_per_token([header]),
    )


def _bytes_per_token(headers: Iterable[Header]) -> float:
    """Bytes of text per token of text (end tokens left out)."""
    listed = list(headers)
    text_tokens = sum(h.tokens - h.documents - 1 for h in listed)
    return sum(h.text_bytes for h in listed) / max(1, text_tokens)
