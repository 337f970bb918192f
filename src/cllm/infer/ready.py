"""An engine with whatever was compiled for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cllm.infer.artifact import load_decode
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.measure import CHOICES, STORED, fastest_weights
from cllm.infer.native import library, load_native
from cllm.infer.stored import KINDS, Integers, summary
from cllm.model.transformer import Transformer


def what_is_compiled(compiled: Path) -> str:
    """Names of the loop and of the steps in the directory ``compiled``, as far as they are there."""
    loop = library().path()
    steps = sorted(path.name for path in compiled.glob("*"))
    return " ".join([loop.name] * loop.is_file() + steps)


def ready_engine(
    model: Transformer,
    options: EngineOptions,
    index: bool,
    compiled: Path,
    say: Callable[[str], None],
    integers: Integers | None = None,
) -> tuple[Engine, str]:
    """An engine with the compiled loop, or else a step from the directory ``compiled``, and the line that
    tells which; empty where there is neither.

    ``integers`` of a compressed file: none for a run, empty where its layers are stored otherwise. ``say``
    is told whether they are taken as they are, and of the ``index`` that is its output head.
    """
    head = None
    if index:
        from cllm.infer.lookup.head import index_head  # brings scipy along

        head = index_head(model, say, options.tokens)
    engine = Engine(model, options, head=head, integers=integers)
    if integers is not None and options.weights in KINDS:
        own = f"the file's own integers, {engine.network.integers}"
        rounded = "the file's layers are no integers with scales, and are rounded to the nearest"
        say(f"weights {options.weights}: {own if integers else rounded}")
    engine.native, line = load_native(engine)
    if engine.native is None:
        engine.compiled, found = load_decode(engine, compiled)
        line = found or line
    return engine, line


def fastest_kind(
    model: Transformer,
    options: EngineOptions,
    index: bool,
    compiled: Path,
    wanted: bool,
    integers: Integers | None,
    say: Callable[[str], None],
) -> str:
    """The weights with which ``model`` takes a step soonest here (``fastest_weights``), measured as it
    would run, by what is ``compiled`` if that is ``wanted``. ``say`` is told the figures."""

    def ready(asked: EngineOptions) -> Engine:
        made, _ = ready_engine(model, asked, index, compiled, lambda line: None, integers)
        made.use_compiled(wanted)
        return made

    how, choices = f"{index} {what_is_compiled(compiled) if wanted else 'eager'}", CHOICES
    if integers:
        how, choices = f"{how} {summary(integers)}", STORED
    kind, line = fastest_weights(model.config, options, ready, how, choices)
    say(line)
    return kind
