"""What ``cllm compress`` does: one file at given bits, within a size, or within a rise of bits per byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from cllm.compress.allocation import allot
from cllm.compress.certificate import check_predictable, forecast
from cllm.compress.codecs.entropy import constriction_stream
from cllm.compress.compressed import Compressed
from cllm.compress.own_points import bits_of_points, has_own_points
from cllm.compress.pipeline import compress
from cllm.compress.settings import CASTS, Settings
from cllm.compress.source import Source, open_source
from cllm.core.atomic import clear_errors
from cllm.core.errors import UsageError, UserError
from cllm.store.container import SUFFIX, is_container
from cllm.store.run import RunDirectory
from cllm.training.progress import Progress

OWN_AT_MOST = 8.0
"""Bits a number up to which ``--table auto`` takes a table's own points: beyond, int8 would be smaller."""
LADDER = (2.0, 3.0, 4.0, 8.0)
CODED_LADDER = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)


def compress_run(
    path: Path,
    settings: Settings,
    progress: Progress,
    *,
    out: Path | None = None,
    calibration: Sequence[str] = (),
    size: str | None = None,
    increase: str | None = None,
    predict: bool = False,
) -> Compressed:
    """Compress the run at ``path`` into ``out`` (by default a file in the run's folder ``compressed``).

    ``size`` (``600KB``): entropy-coded at rates that fit the file. ``increase`` (``1%``): the fewest bits
    at which validation text costs at most that much more. ``predict``: the rise is predicted first, for the
    report to have it beside the measured one. Raises ``UsageError`` and ``UserError``.
    """
    if is_container(path):
        raise UsageError(f"{path} is compressed already: compress the run that it was made of")
    if size is not None and increase is not None:
        raise UsageError("give a size or a rise of the bits per byte, not both")
    if size is not None and (settings.is_cast or not settings.is_coded):
        raise UsageError("--size allots any rates to the layers: add --grid coded")
    if size is not None and settings.table not in ("auto", "lattice"):
        raise UsageError("a size is met by sharing bits with the tables, too: take --table lattice")
    wanted = None if increase is None else parse_share(increase)
    budget = None if size is None else parse_size(size)
    if predict and (budget is not None or wanted is not None):
        raise UsageError(
            "a rise is predicted for given bits: leave out --size, --target-bpb-increase"
        )
    if predict:
        check_predictable(settings)
    target = _default_place(path, settings) if out is None else out
    if target.suffix != SUFFIX:
        raise UsageError(f"--out names the file to make: {target.name} does not end in {SUFFIX}")
    if settings.is_coded or settings.table_as in ("lattice", "own"):
        constriction_stream()  # said before a minute is spent
    source = open_source(path, settings, progress, calibration)
    settings = _with_table(settings, source, progress, shared=budget is not None)
    with clear_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    if budget is not None:
        return allot(source, settings, target, progress, budget)
    if wanted is not None:
        return _within(source, settings, target, progress, wanted)
    if not predict:
        return compress(source, settings, target, progress)
    found = forecast(source, settings, progress)
    progress.say(found.sentence(source.base))
    return replace(compress(source, settings, target, progress), forecast=asdict(found))


def predict_run(
    path: Path, settings: Settings, progress: Progress, *, calibration: Sequence[str] = ()
) -> str:
    """What compressing the run at ``path`` would cost, in a sentence; nothing is compressed.

    Raises ``UsageError`` and ``UserError``.
    """
    if is_container(path):
        raise UsageError(f"{path} is compressed already: predict for the run that it was made of")
    check_predictable(settings)
    source = open_source(path, settings, progress, calibration)
    settings = _with_table(settings, source, progress, shared=False)
    return forecast(source, settings, progress).sentence(source.base)


def _with_table(
    settings: Settings, source: Source, progress: Progress, *, shared: bool
) -> Settings:
    """``settings`` with ``table = auto`` decided for this run; with ``shared`` bits tables take their part
    of these. Raises ``UsageError`` for points that the tables don't have."""
    own = has_own_points(source.config)
    if settings.table == "own" and not own:
        raise UsageError(
            "--table own stores tables that were trained on a lattice (model.embedding.lattice) and are no "
            "sums of pieces; this run's are not: leave it out"
        )
    if settings.table != "auto":
        return settings
    if settings.is_cast or shared or not own:
        return replace(settings, table="lattice")
    bits = bits_of_points(source.model())
    what = f"the points of the lattice that they were trained on, {bits:.1f} bits a number"
    if bits > OWN_AT_MOST:
        progress.say(f"tables: not {what}, but {settings.table_bits:g}")
        return replace(settings, table="lattice")
    progress.say(f"tables: {what}")
    return replace(settings, table="own")


def _within(
    source: Source, settings: Settings, out: Path, progress: Progress, share: float
) -> Compressed:
    """The first rung of the ladder whose rise is within ``share`` of the run's bits per byte."""
    if source.base is None:
        raise UserError(f"{source.run.path} has no validation text to measure the rise on")
    if settings.is_cast or settings.prune or settings.grid.startswith("gguf"):
        raise UsageError("--target-bpb-increase chooses bits: take --grid int or coded")
    for bits in CODED_LADDER if settings.is_coded else LADDER:
        made = compress(source, replace(settings, bits=bits), out, progress)
        assert made.rise is not None
        progress.say(f"{bits:g} bits: {made.rise / source.base:+.2%} bits per byte")
        if made.rise <= share * source.base:
            return made
    out.unlink(missing_ok=True)
    assert made.rise is not None
    raise UserError(
        f"no bits of this grid keep within {share:.2%}: at {bits:g} it is {made.rise / source.base:.2%}"
    )


def parse_size(text: str) -> int:
    """``600KB``, ``1.5MB`` or ``300000`` as bytes (KB is 1,000). Raises ``UsageError``."""
    number = text.strip().upper().removesuffix("B")
    factor = {"K": 1e3, "M": 1e6, "G": 1e9}.get(number[-1:], 1.0)
    try:
        value = float(number.rstrip("KMG")) * factor
    except ValueError as error:
        raise UsageError(f"a size is a number with KB or MB, as in 600KB, not {text!r}") from error
    if not 1 <= value < 1e15:
        raise UsageError(f"a size must be positive, not {text!r}")
    return int(value)


def parse_share(text: str) -> float:
    """``1%`` or ``0.01`` as 0.01. Raises ``UsageError``."""
    number = text.strip()
    try:
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError as error:
        raise UsageError(f"a rise is a share, as in 1% or 0.01, not {text!r}") from error
    if not 0 < value < 10:
        raise UsageError(f"a rise must be positive, as in 1%, not {text!r}")
    return value


def _default_place(source: Path, settings: Settings) -> Path:
    """Where the file goes when no place is given: in the run, named by what was done."""
    run = RunDirectory.open(source)
    what = settings.method
    if settings.method not in CASTS:
        what = f"{settings.bits:g}bit-{settings.method}"
    if settings.prune:
        what += "-pruned-" + settings.prune.replace("%", "").replace(":", "of")
    if settings.recover:
        what += "-recovered"
    grid = "" if settings.grid == "int" or settings.is_cast else f"-{settings.grid}"
    return run.path / "compressed" / f"{run.name}-{what}{grid}.cllm"
