"""Training and using models from Python: what ``cllm.train`` and ``cllm.load`` are."""

from __future__ import annotations

import math
import tempfile
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cllm.core.config import Config
from cllm.core.cpu import team_threads
from cllm.core.duration import parse_duration
from cllm.core.errors import UsageError, UserError
from cllm.core.settings import build, flatten, load_whole, merge, read_toml, write_setting
from cllm.infer.constrain import Format
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.engines import Engines
from cllm.infer.harness import harness_model
from cllm.infer.ready import fastest_kind, ready_engine
from cllm.infer.request import Sampling, refuse_unless
from cllm.infer.score import Score
from cllm.infer.score import score as score_text
from cllm.infer.stored import KINDS, Integers
from cllm.infer.writing import Completion, Prompt, write, write_all
from cllm.model.restored import restored
from cllm.model.transformer import Transformer
from cllm.store import checkpoint as checkpoints
from cllm.store.container import Container, is_container
from cllm.store.metrics import Columns, read_columns
from cllm.store.run import RunDirectory
from cllm.text.dataset import load_prepared
from cllm.text.packed import PackedTokens
from cllm.text.tokenizer import Tokenizer
from cllm.training.progress import Progress, Silent, open_progress

if TYPE_CHECKING:  # generation begins sooner without
    from cllm.training.evaluate import Evaluation


def train(
    data: str | Path | Sequence[str | Path] = (),
    *,
    out: str | Path | None = None,
    config: str | Path | Config | None = None,
    from_run: str | Path | None = None,
    resume: str | Path | None = None,
    time: str | float | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train a model and return its run.

    ``data``: files, directories, globs or ``hf:NAME``; nothing means the built-in corpus. ``config``: a
    TOML file or a ``Config``. ``from_run``: fine-tune another run. ``resume``: go on with a run that was
    interrupted. ``time``: a budget (``"10m"``, or seconds) that chooses the number of steps.
    ``settings``: any setting with its dots as double underscores, e.g. ``train__lr=1e-3``,
    ``model__preset="small"``. Raises ``UserError`` with one line that says what is wrong.
    """
    from cllm.training import session

    changes = {key.replace("__", "."): value for key, value in settings.items()}
    progress = open_progress(quiet=quiet)
    if resume is not None:
        given = {"data": data, "config": config, "from_run": from_run, "out": out, "time": time}
        extra = [name for name, value in given.items() if value]
        if extra:
            raise UsageError(f"resume goes on with a run as it is: leave out {', '.join(extra)}")
        texts = [write_setting(key, value) for key, value in changes.items()]
        return Run(session.resume(resume, texts, progress).run)
    paths = [data] if isinstance(data, str | Path) else list(data)
    if paths:
        changes["data.paths"] = tuple(str(path) for path in paths)
    whole = resolve_config(config, changes, from_run)
    seconds = parse_duration(time) if time is not None else None
    return Run(session.start(whole, progress, out=out, from_run=from_run, seconds=seconds).run)


def load(path: str | Path) -> Run | CompressedModel:
    """The run (a ``Run``) or the compressed model (a ``CompressedModel``) at ``path``.

    Raises ``UserError`` if there is none, or the file is damaged.
    """
    if is_container(path):
        return CompressedModel(Container.open(path))
    return Run(RunDirectory.open(path), chosen=Path(path))


def resolve_config(
    config: str | Path | Config | None,
    changes: dict[str, Any],
    from_run: str | Path | None = None,
) -> Config:
    """A configuration file (or object, or the defaults) with ``changes``; the model is ``from_run``'s."""
    # A Config object doesn't tell what was set and what is a default; a file does, so that its fields
    # win over a preset among the changes.
    asked = read_toml(Path(config)) if isinstance(config, str | Path) else {}
    whole = merge(config, changes) if isinstance(config, Config) else build(asked | changes)
    if from_run is None:
        return whole
    parent = load_whole(RunDirectory.open(from_run).config)
    known = flatten({"model": parent.model.model_dump()})
    kept = {key: value for key, value in known.items() if key != "model.preset"}
    asked = {key: value for key, value in (asked | changes).items() if key.startswith("model.")}
    dropouts = {key: value for key, value in asked.items() if "dropout" in key}
    for key, value in asked.items():
        if key not in dropouts and value != known.get(key):
            raise UsageError(
                f"{key} is fixed by {from_run}: only the dropouts may change with --from; `cllm reduce` "
                "makes a run with a reduced table of it"
            )
    return merge(whole, kept | dropouts)


class Model(ABC):
    """A model that can be used: generate, evaluate. A ``Run`` or a ``CompressedModel``."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """Where it is."""

    @property
    @abstractmethod
    def config(self) -> Config:
        """The resolved configuration."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """The weights by parameter name, in float32."""

    @property
    def integers(self) -> Integers | None:
        """The integers and scales of a compressed file's matrices; none for a run."""
        return None

    @abstractmethod
    def split(self, name: str) -> PackedTokens:
        """A split of its own text; ``UserError`` where there is none."""

    @cached_property
    def model(self) -> Transformer:
        """The model with its weights, in eval mode."""
        torch.set_num_threads(team_threads())  # a container's quota may be less than its cores
        attention = self.config.train.attention
        attention = "matmul" if attention == "auto" else attention
        return restored(self.config.model, self.weights(), self.path, attention)

    @cached_property
    def _engines(self) -> Engines:
        return Engines()

    def engine(
        self,
        *,
        slots: int = 1,
        weights: str = "fp32",
        cache: str = "fp32",
        compiled: bool = True,
        index: bool = False,
        number: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> Engine:
        """The engine of these options and this ``number``, made once; it writes for one caller at a time.

        It runs the step that ``cllm compile`` left beside the run, if there is one for it, unless
        ``compiled`` is False. ``say`` is told which, in one line. ``weights`` may be ``auto``: what was
        measured to be the fastest here. ``index``: tokens are chosen by an exact index (``IndexHead``).
        """
        tokens = self.tokenizer.vocab_size
        held = self.integers if weights in ("auto", *KINDS) else None
        if weights == "auto":
            asked = EngineOptions(slots=slots, cache=cache, tokens=tokens)
            weights = fastest_kind(self.model, asked, index, self.compiled, compiled, held, say)
        options = EngineOptions(slots=slots, weights=weights, cache=cache, tokens=tokens)
        make = partial(ready_engine, self.model, options, index, self.compiled, say, held)
        return self._engines.kept((options, index, number), make, compiled, say)

    @property
    def compiled(self) -> Path:
        """Where compiled steps of it lie: in the run's directory, or beside the file."""
        return self.path / "compiled" if self.path.is_dir() else Path(f"{self.path}.compiled")

    def generate(self, prompt: str = "", *, form: Format | None = None, **sampling: Any) -> str:
        """The text that the model writes after ``prompt`` (the prompt itself is not repeated).

        ``sampling``: fields of ``Sampling``, as ``max_tokens``, ``temperature``, ``seed``, ``stop``.
        """
        return "".join(self.stream(prompt, Sampling(**sampling), form=form))

    def stream(
        self,
        prompt: str,
        sampling: Sampling,
        *,
        form: Format | None = None,
        engine: Engine | None = None,
    ) -> Iterator[str]:
        """The same piece by piece, never cutting a character in two or showing part of a stop text."""
        with self._engines.lent(engine, self.engine) as own:
            yield from write(own, self.tokenizer, Prompt(prompt, sampling, form))

    def complete(
        self,
        prompts: Iterable[str | Prompt],
        *,
        slots: int = 8,
        engine: Engine | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Completions of many prompts, ``slots`` at once, in the order of the prompts."""
        common = Sampling(**sampling)
        given = (p if isinstance(p, Prompt) else Prompt(p, common) for p in prompts)
        with self._engines.lent(engine, partial(self.engine, slots=slots)) as own:
            found = dict(write_all(own, self.tokenizer, given))
        return [found[index] for index in sorted(found)]

    def score(self, text: str, prompt: str | None = None) -> Score:
        """The log-likelihood of ``text``, or of ``text`` after ``prompt``, and its bits per byte."""
        return score_text(self.engine(), self.tokenizer, text, prompt)

    def harness_model(self, *, slots: int = 8) -> Any:
        """This run as a model for ``lm_eval.simple_evaluate(model=…)``; needs ``cllm[lm-eval]``."""
        return harness_model(self.engine(slots=slots), self.tokenizer)

    def evaluate(
        self,
        data: str | Path | Sequence[str | Path] = (),
        *,
        split: str = "validation",
        progress: Progress | None = None,
    ) -> Evaluation:
        """Score other text, or a split of a run's own, in the run's precision.

        Raises ``UserError`` for text that cannot be read and for a split the run does not have.
        """
        paths = [data] if isinstance(data, str | Path) else list(data)
        if not paths:
            if split not in ("train", "validation", "test"):
                raise UsageError(f"split {split!r} is none of train, validation, test")
            return self._score(self.split(split), progress or Silent())
        from cllm.text.corpus import tokens_for_eval  # generation begins sooner without

        with tempfile.TemporaryDirectory() as place:
            names, field = [str(path) for path in paths], self.config.data.field
            tokens = tokens_for_eval(names, self.tokenizer, place, field=field)
            return self._score(tokens, progress or Silent())

    def _score(self, tokens: PackedTokens, progress: Progress) -> Evaluation:
        from cllm.compress.score import score

        windows = -(-(len(tokens) - 1) // self.config.model.context)
        with progress.stage("evaluating", windows) as advance:
            found = score(self.model, self.config, tokens, advance)
        refuse_unless(math.isfinite(found.loss))
        return found


@dataclass(frozen=True)
class CompressedModel(Model):
    """A compressed model in one file, made by ``cllm compress``."""

    container: Container

    @property
    def path(self) -> Path:
        """The file."""
        return self.container.path

    @cached_property
    def config(self) -> Config:
        """The configuration of the run that it was made of, without the places of its text."""
        return build(flatten(tomllib.loads(self.container.header.config)))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file."""
        return Tokenizer.from_json(self.container.tokenizer(), str(self.path))

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights as the file holds them, dense in float32."""
        from cllm.compress.formats import read_state  # runs begin sooner without

        return read_state(self.container)

    @cached_property
    def integers(self) -> Integers:
        """Those of the file by parameter name; empty where its layers are stored otherwise."""
        from cllm.compress.formats import read_integers

        return read_integers(self.container)

    def split(self, name: str) -> PackedTokens:
        """None: the file has no text."""
        raise UserError(f"{self.path} has no text of its own: give some (--data)")


@dataclass(frozen=True)
class Run(Model):
    """A trained (or half-trained) run: generate, evaluate, look back."""

    directory: RunDirectory
    chosen: Path | None = None
    """A checkpoint of the run to use; none means its best one."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @cached_property
    def config(self) -> Config:
        """The resolved configuration."""
        return load_whole(self.directory.config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return Tokenizer.load(self.directory.tokenizer)

    def weights(self) -> dict[str, torch.Tensor]:
        """The best weights, or those of the chosen checkpoint."""
        return checkpoints.load_weights(self.chosen or self.path)

    def split(self, name: str) -> PackedTokens:
        """The packed tokens of a split; ``UserError`` where the run has none."""
        tokens: PackedTokens | None = getattr(load_prepared(self.directory.data), name)
        if tokens is None:
            raise UserError(f"{self.path} has no {name} split")
        return tokens

    def metrics(self, kind: str = "train") -> Columns:
        """Columns of ``metrics.jsonl`` for one kind of line: ``train``, ``validation`` or ``test``."""
        return read_columns(self.directory.metrics, kind)

    @property
    def report(self) -> Path:
        """``report.md`` of the run."""
        return self.directory.report
