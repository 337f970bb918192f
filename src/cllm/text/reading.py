"""Sources to a spool: every document read once, every problem told in one error."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cllm.core.atomic import clear_errors
from cllm.core.errors import UserError
from cllm.text.notes import Notes
from cllm.text.sources import Source
from cllm.text.spool import Spool


@contextmanager
def spooled(
    sources: Sequence[Source],
    field: str,
    directory: Path,
    notes: Notes,
    progress: Callable[[float], None] = lambda share: None,
) -> Iterator[Spool]:
    """All documents of the sources in a frozen spool, in temporary files of ``directory``.

    ``progress`` gets the share of sources read. Raises ``UserError`` listing every file that cannot be
    decoded, or if there is no text at all.
    """
    with (
        clear_errors(directory / "temporary files"),
        tempfile.TemporaryFile(dir=directory) as texts,
        tempfile.TemporaryFile(dir=directory) as names,
    ):
        spool = Spool(texts, names)
        for number, source in enumerate(sources):
            progress(number / len(sources))
            for document in source.documents(field, notes):
                if not notes.problems:  # else only look for what further files are broken
                    spool.add(document)
        progress(1.0)
        notes.raise_problems()
        if not spool.size:
            listed = ", ".join(source.name for source in sources[:3])
            raise UserError(
                f"there is no text in {listed}{' …' if len(sources) > 3 else ''}; give files with some"
            )
        spool.freeze()
        yield spool
