"""An engine with whatever was compiled for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cllm.infer.artifact import load_decode
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.native import library, load_native
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
) -> tuple[Engine, str]:
    """An engine with the compiled loop, or else a step from the directory ``compiled``, and the line that
    tells which; empty where there is neither. ``say`` is told of the ``index`` that is its output head."""
    head = None
    if index:
        from cllm.infer.lookup.head import index_head  # brings scipy along

        head = index_head(model, say, options.tokens)
    engine = Engine(model, options, head=head)
    engine.native, line = load_native(engine)
    if engine.native is None:
        engine.compiled, found = load_decode(engine, compiled)
        line = found or line
    return engine, line
