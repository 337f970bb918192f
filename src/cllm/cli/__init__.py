"""The roof: parses the command line and calls. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from cllm import __version__
from cllm.cli import (
    bench,
    compress,
    config,
    export,
    generate,
    lattice,
    plan,
    reduce,
    runs,
    score,
    tokenizer,
    tokens,
    train,
    use,
)
from cllm.core.errors import UserError
from cllm.core.torchrun import launched, leave

app = typer.Typer(
    name="cllm",
    help="Train a small language model on your own text, compress it with lattice methods, deploy it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(train.train)
app.command()(plan.plan)
app.command()(reduce.reduce)
app.command()(compress.compress)
app.command("eval")(use.evaluate)
app.command()(generate.generate)
app.command()(score.score)
app.command("compile")(generate.compile_run)
app.command()(export.export)
app.command()(export.verify)
app.command()(config.info)
app.command()(bench.bench)
app.add_typer(config.app, name="config")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(tokens.app, name="tokens")
app.add_typer(runs.app, name="runs")
app.add_typer(lattice.app, name="lattice")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cllm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    if debug:
        os.environ["CLLM_DEBUG"] = "1"


def main() -> None:
    """Run the command line: exit code 0, 1 (it went wrong) or 2 (it was asked wrongly)."""
    try:
        with _told_of_signals():
            app()
    except UserError as error:
        _end(str(error), error.exit_code, error)
    except BrokenPipeError:
        # The reader (`| head`) has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except _StoppedError as error:
        _end(str(error), 128 + error.signum, error)


class _StoppedError(BaseException):
    """Ctrl-C or SIGTERM came. (A KeyboardInterrupt would be typer's, which says nothing.)"""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@contextmanager
def _told_of_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM unwind what is at work, instead of leaving half of it behind."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _StoppedError(signum)

    heard = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a script's background
        heard.append(signal.SIGINT)
    before = {signum: signal.signal(signum, stop) for signum in heard}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end(text: str, code: int, error: BaseException) -> None:
    if os.environ.get("CLLM_DEBUG"):
        raise error
    typer.echo(f"cllm: {text}", err=True)
    if launched() is not None:
        leave(code)
    sys.exit(code)
