"""Training and using models from Python: what ``cllm.train`` and ``cllm.load`` are."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cllm.compress.formats import read_state
from cllm.compress.score import score
from cllm.core.config import Config
from cllm.core.duration import parse_duration
from cllm.core.errors import UsageError, UserError
from cllm.core.machine import machine
from cllm.core.settings import build, flatten, load_config, merge, read_toml, write_setting
from cllm.infer.generate import stream
from cllm.infer.sampling import Sampling
from cllm.infer.streaming import TextStream
from cllm.model.transformer import Transformer
from cllm.store import checkpoint as checkpoints
from cllm.store.container import Container, is_container
from cllm.store.metrics import Columns, read_columns
from cllm.store.run import RunDirectory
from cllm.text.corpus import tokens_for_eval
from cllm.text.dataset import load_prepared
from cllm.text.packed import PackedTokens
from cllm.text.tokenizer import Tokenizer
from cllm.training.conclude import Outcome
from cllm.training.evaluate import Evaluation
from cllm.training.progress import Progress, Silent, open_progress
from cllm.training.session import resume as resume_session
from cllm.training.session import start


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
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    progress = open_progress(quiet=quiet)
    if resume is not None:
        given = {"data": data, "config": config, "from_run": from_run, "out": out, "time": time}
        extra = [name for name, value in given.items() if value]
        if extra:
            raise UsageError(f"resume goes on with a run as it is: leave out {', '.join(extra)}")
        texts = [write_setting(key, value) for key, value in changes.items()]
        return Run(resume_session(resume, texts, progress).run)
    paths = [data] if isinstance(data, str | Path) else list(data)
    if paths:
        changes["data.paths"] = tuple(str(path) for path in paths)
    whole = resolve_config(config, changes, from_run)
    seconds = parse_duration(time) if time is not None else None
    return Run(start(whole, progress, out=out, from_run=from_run, seconds=seconds).run)


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
    """A configuration file (or object, or the defaults) with dotted ``changes``.

    With ``from_run``, the model is that run's.
    """
    # A Config object doesn't tell what was set and what is a default; a file does, so that its fields
    # win over a preset among the changes.
    asked = read_toml(Path(config)) if isinstance(config, str | Path) else {}
    whole = merge(config, changes) if isinstance(config, Config) else build(asked | changes)
    if from_run is None:
        return whole
    parent = load_config(RunDirectory.open(from_run).config)
    known = flatten({"model": parent.model.model_dump()})
    kept = {key: value for key, value in known.items() if key != "model.preset"}
    asked = {key: value for key, value in (asked | changes).items() if key.startswith("model.")}
    dropouts = {key: value for key, value in asked.items() if "dropout" in key}
    for key, value in asked.items():
        if key not in dropouts and value != known.get(key):
            raise UsageError(
                f"{key} is fixed by {from_run}: only the dropouts may change with --from"
            )
    return merge(whole, kept | dropouts)


class Model:
    """A model that can be used: generate, evaluate. A ``Run`` or a ``CompressedModel``."""

    @property
    def path(self) -> Path:
        """Where it is."""
        raise NotImplementedError

    @cached_property
    def config(self) -> Config:
        """The resolved configuration."""
        raise NotImplementedError

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights by parameter name, in float32."""
        raise NotImplementedError

    def split(self, name: str) -> PackedTokens:
        """A split of its own text; ``UserError`` where there is none."""
        raise NotImplementedError

    @cached_property
    def model(self) -> Transformer:
        """The model with its weights, in eval mode."""
        torch.set_num_threads(machine().threads)  # a container's quota may be less than its cores
        attention = self.config.train.attention
        model = Transformer(self.config.model, "matmul" if attention == "auto" else attention)
        model.load_state_dict(self.weights())
        return model.eval()

    def generate(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The text that the model writes after ``prompt`` (the prompt itself is not repeated)."""
        sampling = Sampling(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        return "".join(self.stream(prompt, sampling))

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """The same piece by piece, never cutting a character in two."""
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError("the prompt is not valid UTF-8 text") from error
        tokenizer = self.tokenizer
        # A text begins after an end token, as in training.
        ids = [tokenizer.end_id, *map(int, tokenizer.encode(prompt))]
        text = TextStream(tokenizer)
        for token in stream(self.model, ids, sampling, end_id=tokenizer.end_id):
            piece = text.feed(token)
            if piece:
                yield piece
        rest = text.end()
        if rest:
            yield rest

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
        with tempfile.TemporaryDirectory() as place:
            names = [str(path) for path in paths]
            field = self.config.data.field
            tokens = tokens_for_eval(names, self.tokenizer, place, field=field)
            return self._score(tokens, progress or Silent())

    def _score(self, tokens: PackedTokens, progress: Progress) -> Evaluation:
        windows = -(-(len(tokens) - 1) // self.config.model.context)
        with progress.stage("evaluating", windows) as advance:
            return score(self.model, self.config, tokens, advance)


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
        return read_state(self.container)

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
        return load_config(self.directory.config)

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


def outcome_lines(outcome: Outcome) -> list[str]:
    """What a person wants to know when training has ended."""
    lines = []
    for name, found in (("validation", outcome.validation), ("test", outcome.test)):
        if found is not None:
            lines.append(
                f"{name}: {found.bpb:.4f} bits per byte (loss {found.loss:.4f} nats per token, "
                f"perplexity {found.perplexity:.1f}, {found.bytes:,} bytes held out)"
            )
    return lines
