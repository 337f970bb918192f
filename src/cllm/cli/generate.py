"""``cllm generate`` and ``cllm compile``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cllm.cli.terminal import printable
from cllm.cli.use import RunPath

if TYPE_CHECKING:
    from cllm.api import Model
    from cllm.infer.constrain import Format
    from cllm.infer.engine import Engine
    from cllm.infer.request import Sampling
    from cllm.text.tokenizer import Tokenizer

BATCH_SLOTS = 8

Weights = Annotated[
    str,
    typer.Option(help="fp32, bf16, fp16, int8, int8-dynamic, int4, or auto: the fastest here."),
]
CacheKind = Annotated[str, typer.Option("--cache", help="Keys and values as fp32, bf16 or int8.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress display.")]


def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help='Many prompts, one {"prompt": …} a line; needs --out.'
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Where the answers go; what is there is gone on with."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; higher is more surprising.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0 is off.")] = 50,
    top_p: Annotated[
        float, typer.Option(help="Draw from the fewest that reach this probability; 1 is off.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw from what has this share of the likeliest's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that are there already become less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="The output must match this regular expression.")
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The output must be JSON of the schema in this file."),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --prompts: each token's log-probability, and of so many others."),
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help=f"With --prompts: texts at once (default {BATCH_SLOTS}).")
    ] = None,
    weights: Weights = "fp32",
    cache: CacheKind = "fp32",
    compiled: Annotated[
        bool,
        typer.Option("--compiled/--eager", help="Use what `cllm compile` made, if it is there."),
    ] = True,
    index: Annotated[
        bool,
        typer.Option(
            "--index", help="Find the likeliest tokens by an exact index, for large vocabularies."
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Let a model write on from a prompt, or from each prompt of a file."""
    from cllm.core.errors import UsageError
    from cllm.core.threads import spin_briefly

    if (prompts is None) != (out is None):
        raise UsageError("--prompts and --out go together: give both, or neither")
    if prompts is None and (logprobs is not None or slots is not None):
        raise UsageError("--logprobs and --slots are for --prompts FILE --out FILE")
    if prompts is not None and prompt:
        raise UsageError("--prompt and --prompts exclude each other; leave one out")
    from cllm.infer.request import Sampling

    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        logprobs=logprobs,
    )
    plain = prompts is None and regex is None and json_schema is None
    usual = (weights, cache, compiled, index) == ("fp32", "fp32", True, False)
    if plain and usual and _write_directly(run, prompt, sampling, quiet):
        return
    spin_briefly()  # before torch is loaded

    from cllm.api import load

    form, loaded = _format(regex, json_schema), load(run)
    count = 1 if prompts is None else BATCH_SLOTS if slots is None else slots
    engine = loaded.engine(
        slots=count,
        weights=weights,
        cache=cache,
        compiled=compiled,
        index=index,
        say=_teller(quiet),
    )
    if prompts is not None and out is not None:
        _answer(loaded, engine, prompts, out, sampling, form, quiet)
    else:
        pieces = loaded.stream(prompt, sampling, form=form, engine=engine)
        _write(pieces, loaded.tokenizer, engine.capacity, prompt, quiet)


def compile_run(
    run: RunPath,
    slots: Annotated[int, typer.Option(help="Texts that are written at once.")] = 1,
    weights: Weights = "fp32",
    cache: CacheKind = "fp32",
    quiet: Quiet = False,
) -> None:
    """Compile the writing of tokens: `cllm generate` then uses it.

    For most models that is one library for this machine, in the cache directory; for others a step of
    their own, kept beside the run.
    """
    from cllm.core.threads import spin_briefly

    spin_briefly()  # before torch is loaded

    from cllm.api import load
    from cllm.infer.artifact import compile_decode
    from cllm.infer.native import compile_library, obstacle
    from cllm.training.progress import open_progress

    loaded, progress = load(run), open_progress(quiet=quiet)
    make = partial(loaded.engine, slots=slots, cache=cache, say=progress.say)
    engine = make(weights="fp32" if weights == "auto" else weights, compiled=False)
    if weights == "auto":  # measured as `cllm generate` will: with the loop, where it fits
        if not obstacle(engine.network, engine.options):
            with progress.stage("compiling"):
                compile_library()
        engine = make(weights=weights)
    with progress.stage("compiling"):
        unknown = obstacle(engine.network, engine.options)
        path = compile_decode(engine, loaded.compiled) if unknown else compile_library()
    if unknown:
        progress.say(f"a step of its own, since the common library does not know {unknown}")
    typer.echo(str(path))


def _write_directly(run: Path, prompt: str, sampling: Sampling, quiet: bool) -> bool:
    """Write by the compiled loop alone, without torch; False where that is not for this run."""
    from cllm.infer.direct import fits, load_direct

    direct = load_direct(run) if fits(sampling) else None
    if direct is None:
        return False
    _teller(quiet)(direct.line)
    pieces = direct.write(prompt, sampling)
    _write(pieces, direct.tokenizer, direct.capacity, prompt, quiet)
    return True


def _write(
    pieces: Iterator[str], tokenizer: Tokenizer, capacity: int, prompt: str, quiet: bool
) -> None:
    first = next(pieces, "")  # what is wrong shows before the prompt is echoed
    length = 1 + len(tokenizer.encode(prompt))
    if length > capacity:
        _teller(quiet)(
            f"the prompt has {length} tokens and the model's context {capacity}: its last "
            f"{capacity} are read"
        )
    typer.echo(printable(prompt + first), nl=False)
    for piece in pieces:
        typer.echo(printable(piece), nl=False)
    typer.echo("")


def _answer(
    model: Model,
    engine: Engine,
    prompts: Path,
    out: Path,
    sampling: Sampling,
    form: Format | None,
    quiet: bool,
) -> None:
    from cllm.infer.jsonl import answer_file
    from cllm.training.progress import open_progress

    progress = open_progress(quiet=quiet)
    with progress.stage("writing", 1) as advance:
        done = answer_file(engine, model.tokenizer, prompts, out, sampling, form, advance)
    kept = f", {done.kept} of them kept from before" if done.kept else ""
    cut = (
        f"; {done.cut} prompts were longer than the context and lost their beginning"
        if done.cut
        else ""
    )
    progress.say(f"{out}: {done.total} answers{kept}{cut}")


def _format(regex: str | None, schema: Path | None) -> Format | None:
    from cllm.core.atomic import clear_errors
    from cllm.core.errors import UsageError, UserError
    from cllm.infer.constrain import Format

    if regex is not None and schema is not None:
        raise UsageError("--regex and --json-schema exclude each other; leave one out")
    if regex is not None:
        return Format("regex", regex)
    if schema is None:
        return None
    with clear_errors(schema, "read"):
        try:
            return Format("json", schema.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{schema} is not UTF-8; save it in that encoding") from error


def _teller(quiet: bool) -> Callable[[str], None]:
    def tell(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    return tell
