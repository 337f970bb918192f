"""What all benches share: rows, claims, interleaved timing in subprocesses, tables, JSON, results files.

A contestant runs in a process of its own, so that no allocator setting, thread pool or compiled code of
one helps or harms another. The processes take turns: each measures a short round while the others
sleep, so that what the machine does meanwhile falls on all alike.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from cllm.bench.markdown import MEASURED, bound, markdown_table
from cllm.core.atomic import new_file, write_text
from cllm.core.cpu import load_average
from cllm.core.errors import UsageError, UserError, nearest
from cllm.core.machine import machine

BENCHES = {
    "train": "training",
    "attention": "attention",
    "original": "original",
    "startup": "startup",
    "lattice": "lattice",
    "layout": "layout",
    "embed": "embed",
    "tables": "tables",
    "lookup": "lookup",
    "codes": "codes",
    "parallel": "parallel",
    "plan": "plan",
    "compress": "compress",
    "infer": "infer",
}
"""Name of a bench to its module in ``cllm.bench``."""
RESULTS = Path("docs", "results")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a bench may be asked for."""

    data: tuple[str, ...] = ()
    quick: bool = False
    ladder: bool = False
    minutes: float | None = None
    """Begin nothing new after this time; what is missing is said."""
    write: bool = False
    """Results are written, and what a bench keeps with the project."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A figure and what it should be. ``holds`` is ``None`` where it cannot be judged; ``why`` says."""

    name: str
    value: float | None
    required: float | None
    aim: float | None = None
    higher_is_better: bool = True
    why: str = ""
    judged: bool = True

    @property
    def holds(self) -> bool | None:
        """Whether the requirement is met."""
        if self.value is None or self.required is None or not self.judged:
            return None
        return self.value >= self.required if self.higher_is_better else self.value <= self.required

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        body = asdict(self) | {"holds": self.holds}
        del body["judged"]
        return body


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a bench measured."""

    bench: str
    rows: list[dict[str, Any]]
    claims: list[Claim]
    notes: list[str] = field(default_factory=list)
    packages: tuple[str, ...] = ("torch",)
    load_before: float | None = None
    busy: str = ""
    """Why the machine was not free, if it was not."""
    headline: list[dict[str, Any]] = field(default_factory=list)
    """The few figures that the README shows."""
    plots: dict[str, Any] = field(default_factory=dict)
    """Figures of matplotlib by what they show; written as ``NAME-WHAT.svg`` and ``.png``."""

    @property
    def holds(self) -> bool:
        """Whether no claim falls short."""
        return all(claim.holds is not False for claim in self.claims)

    def to_json(self) -> dict[str, Any]:
        """The object that ``cllm bench --json`` prints."""
        here = machine()
        return {
            "bench": self.bench,
            "machine": {
                "processor": here.cpu,
                "threads": here.threads,
                "instruction_sets": list(here.instruction_sets),
                "system": here.system,
                "load_before": self.load_before,
            },
            "versions": versions(self.packages),
            "rows": self.rows,
            "claims": [claim.to_json() for claim in self.claims],
            "notes": self.notes,
        }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions of ``packages`` and of cllm."""
    found = {}
    for name in ("cllm", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def load_bench(name: str, options: Options) -> Callable[[Options], Result]:
    """The function ``run`` of the bench ``name``.

    ``UsageError`` if there is none, or if it has no use for one of ``options``.
    """
    if name not in BENCHES:
        known = ", ".join(BENCHES)
        raise UsageError(
            f"there is no bench {name!r}{nearest(name, list(BENCHES))}; known: {known}"
        )
    module = importlib.import_module(f"cllm.bench.{BENCHES[name]}")
    takes: frozenset[str] = getattr(module, "TAKES", frozenset())
    for option in ("data", "ladder", "minutes"):
        if getattr(options, option) not in (None, False, ()) and option not in takes:
            raise UsageError(f"the bench {name!r} takes no --{option}; leave it out")
    run: Callable[[Options], Result] = module.run
    return run


class Contestant:
    """A subprocess that measures a round whenever it is asked to.

    It runs ``python -m module …arguments``, prints one JSON line when it is ready, and one for each
    line it reads; it ends when its input is closed.
    """

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], env: dict[str, str]
    ) -> None:
        self.name = name
        # A file, since nobody reads a pipe of warnings until it is full.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=env,
            text=True,
        )
        try:
            self.ready = self._read()
        except BaseException:
            self.close()
            raise

    def round(self) -> dict[str, Any]:
        """Ask for one round and wait for its figures."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or ["no message"]
            raise UserError(f"the bench process {self.name!r} failed: {last[0]}")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def contest(starts: Iterable[Callable[[], Contestant]]) -> Iterator[list[Contestant]]:
    """Start contestants one after the other; all that were started are ended, whatever happens."""
    with ExitStack() as stack:
        started = []
        for start in starts:
            started.append(start())
            stack.callback(started[-1].close)
        yield started


def answer_rounds(ready: dict[str, Any], one_round: Callable[[], dict[str, Any]]) -> None:
    """The contestant's side: say ready, then measure a round for each line read."""
    print(json.dumps(ready), flush=True)
    for _ in sys.stdin:
        print(json.dumps(one_round()), flush=True)


def interleaved(
    contestants: Sequence[Contestant], rounds: int, say: Callable[[str], None] = lambda text: None
) -> dict[str, list[dict[str, Any]]]:
    """``rounds`` rounds of each contestant in turn, the order reversed every other time."""
    figures: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contestants}
    for number in range(rounds):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            figures[contestant.name].append(contestant.round())
        say(f"round {number + 1} of {rounds}")
    return figures


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times as much ``ours`` is as ``theirs``."""
    return median(ours) / median(theirs)


def spread(values: Sequence[float]) -> str:
    """``lowest–highest`` of the values, in whole numbers."""
    return f"{min(values):,.0f}–{max(values):,.0f}"


def load_now() -> float | None:
    """The load before the bench begins (afterwards it is the bench's own)."""
    return load_average()


def render(result: Result) -> str:
    """A table of rows and one of claims, for people (it is Markdown, too)."""
    body = result.to_json()
    here = body["machine"]
    load = "" if result.load_before is None else f", load before {result.load_before:.2f}"
    lines = [f"# bench {result.bench}", ""]
    lines += [f"{here['processor']}, {here['threads']} threads{load}", ""]
    lines += [", ".join(f"{name} {version}" for name, version in body["versions"].items()), ""]
    lines += markdown_table(result.rows)
    if result.claims:
        claims = [
            {
                "claim": claim.name,
                MEASURED: claim.value,
                "required": bound(claim.required, claim.higher_is_better),
                "aim": bound(claim.aim, claim.higher_is_better),
                "holds": {True: "yes", False: "**no**", None: f"– ({claim.why})"}[claim.holds],
            }
            for claim in result.claims
        ]
        lines += ["", *markdown_table(claims)]
    lines += [f"\n{note}" for note in result.notes]
    return "\n".join(lines)


def write_results(result: Result, arguments: Sequence[str], root: Path = Path()) -> Path:
    """Write ``docs/results/NAME.md``: the tables with the machine, the date and the command.

    Where ``README.md`` has a place marked ``<!-- bench:NAME -->``, its headline goes there.
    """
    path = root / RESULTS / f"{result.bench}.md"
    command = shlex.join(["cllm", *arguments])
    origin = f"Measured on {date.today().isoformat()} by `{command}`."
    if result.busy:
        origin += f" The machine was not free: {result.busy}."
    path.parent.mkdir(parents=True, exist_ok=True)
    images = ""
    for name, figure in result.plots.items():
        for kind in ("svg", "png"):
            with new_file(path.with_name(f"{result.bench}-{name}.{kind}")) as file:
                figure.savefig(file, format=kind, dpi=110)
        images += f"\n\n![{name}]({result.bench}-{name}.svg)"
    write_text(path, f"{render(result)}{images}\n\n{origin}\n")
    readme = root / "README.md"
    if result.headline and readme.is_file():
        here = machine()
        link = f"[All of it](docs/results/{result.bench}.md)."
        about = f"{here.cpu}, {here.threads} threads. {origin}"
        body = "\n".join([*markdown_table(result.headline), "", about, link])
        text = readme.read_text(encoding="utf-8")
        place = re.compile(rf"(<!-- bench:{result.bench} -->\n).*?(<!-- /bench -->)", re.DOTALL)
        write_text(readme, place.sub(lambda m: f"{m[1]}{body}\n{m[2]}", text))
    return path
