"""The configuration of a run: frozen, validated, written whole into ``run.toml``.

Each section is a frozen pydantic model; an unknown key is refused with the nearest known one. Values
that depend on the machine (``train.device``, ``.dtype``, ``.attention``, ``.compile``, ``.threads``)
may be ``"auto"``: ``cllm.training.choose`` resolves them, and the resolved values are what ``run.toml``
holds and what a resumed run uses again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cllm.core.errors import UsageError
from cllm.core.model_config import ModelConfig
from cllm.core.pipeline_config import PipelineConfig, against_early_update, against_pipeline
from cllm.core.section import Fraction, NonNegative, PositiveInt, Section
from cllm.core.teaching_config import SampledConfig, SimilarityConfig


class DataConfig(Section):
    """Where the text comes from and how it is split."""

    paths: tuple[str, ...] = ()
    """Files, directories, globs or ``hf:NAME``; empty means the built-in corpus."""
    field: str = "text"
    """The field of a JSONL record that holds the text."""
    validation: Fraction = 0.05
    """Share of the corpus (bytes) held out for early stopping and choices."""
    test: Fraction = 0.05
    """Share of the corpus (bytes) looked at once, for the report."""
    split: Literal["auto", "document", "block"] = "auto"
    """Split by whole documents or by contiguous blocks; ``auto`` takes blocks where documents are few."""
    near_duplicates: Literal["report", "drop", "off"] = "report"
    """Training text that nearly repeats held-out text: report it, drop it from training, or look away."""

    @field_validator("paths")
    @classmethod
    def _text(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if any("\ud800" <= letter <= "\udfff" for letter in path):
                raise ValueError(
                    f"the name {path!r} is no valid text, which run.toml could not hold; rename the "
                    "file, or give the directory it is in"
                )
        return paths

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.validation + self.test >= 0.9:
            raise ValueError("data.validation + data.test must leave at least a tenth for training")
        return self


class TokenizerConfig(Section):
    """The byte-level BPE tokenizer."""

    vocab_size: Annotated[int, Field(ge=257, le=2**20)] = 4096
    """Entries of the vocabulary, the 256 bytes and the special tokens included."""
    file: str | None = None
    """A ``tokenizer.json`` to use instead of training one."""
    sample_bytes: PositiveInt = 100_000_000
    """At most this many bytes of the training split are sampled to train the tokenizer."""
    special_tokens: tuple[str, ...] = ()
    """Further special tokens beside the end token ``<|endoftext|>``."""
    order: Literal["auto", "tokenizer", "frequency", "ulam", "morton", "hilbert", "random"] = "auto"
    """Numbering of a trained tokenizer's ids: the token table's order in memory; ``auto`` goes by size."""


class ParallelConfig(Section):
    """Several processes, on one machine or more."""

    workers: Literal["auto"] | PositiveInt = 1
    """Processes that share the windows of a step; each has ``train.threads`` threads."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: all weights in each process (torch's DDP), or a share of them (FSDP2)."""


class TrainConfig(Section):
    """The training loop."""

    steps: PositiveInt = 600
    """Optimizer steps."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the start, the splits, the order of batches and the dropout."""
    batch_size: PositiveInt = 16
    """Windows of one micro-batch."""
    accumulate: PositiveInt = 1
    """Micro-batches of one optimizer step; the gradient is the mean over all target tokens."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The update rule."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of AdamW's averages of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to AdamW's root of the averaged square."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices and tables; vectors are never decayed."""
    clip: NonNegative = 1.0
    """Global gradient norm above which the gradient is scaled down before the step; 0 turns it off."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "step"] = "cosine"
    """Shape of the learning rate after the warm-up (see ``docs/training.md``)."""
    warmup: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up; none means 5% of the steps, at most 200."""
    min_lr: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Learning rate at the end, as a share of ``lr``."""
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """``wsd``: the share of the steps at the end in which the rate falls to ``min_lr``."""
    step_every: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """``step``: the share of the steps after which the rate is multiplied by ``step_factor``."""
    step_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """``step``: the factor of each drop."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``auto``."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of forward and backward; the weights that the optimizer holds are always fp32."""
    attention: Literal["auto", "sdpa", "matmul"] = "auto"
    """torch's fused attention, or explicit matrix products."""
    compile: Literal["auto", "on", "off"] = "auto"
    """``torch.compile``; ``auto`` weighs the length of the run."""
    threads: Literal["auto"] | PositiveInt = "auto"
    """Threads of one operation; one where there are several workers."""
    overlap: bool = True
    """Prepare the next batch and write log and checkpoints on threads beside the steps; same bits."""
    optimizer_in_backward: bool = False
    """Update a tensor as soon as its gradient is known; needs ``clip = 0``, one micro-batch, eager code."""
    parallel: ParallelConfig = ParallelConfig()
    pipeline: PipelineConfig = PipelineConfig()
    loss_chunk: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Rows of the output head computed at a time; 0 means all at once."""
    loss: Literal["exact", "sampled"] = "exact"
    """Cross-entropy over the vocabulary, or an estimate of it from candidates; scores are always exact."""
    sampled: SampledConfig = SampledConfig()
    similarity: SimilarityConfig = SimilarityConfig()
    lazy_rows: Literal["auto", "on", "off"] = "auto"
    """Update only those rows of a token table that a step uses, where it does not use all."""
    eval_every: PositiveInt = 200
    """Steps between validations."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Validations without improvement after which training stops; 0 never stops."""
    min_improvement: NonNegative = 1e-3
    """Bits per byte that count as an improvement."""
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept beside the best one."""
    max_nonfinite: PositiveInt = 10
    """Skipped steps in a row (non-finite loss or gradient) that end the run."""

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up, resolved."""
        return self.warmup if self.warmup is not None else min(200, self.steps // 20)

    @property
    def momentum_outlasts_scale(self) -> bool:
        """Whether AdamW's mean decays no faster than the root of its square: what an idle row then does
        has no closed form."""
        beta1, beta2 = self.betas
        return self.optimizer == "adamw" and beta1**2 >= beta2

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup is not None and self.warmup >= self.steps:
            raise ValueError(
                f"train.warmup = {self.warmup} leaves nothing of train.steps = {self.steps}; lower it"
            )
        if not (
            self.device in ("auto", "cpu", "mps", "cuda")
            or (self.device.startswith("cuda:") and self.device[5:].isdigit())
        ):
            raise ValueError(
                f"train.device = {self.device!r} is none of auto, cpu, cuda, cuda:N, mps"
            )
        return self

    def check_asked(self) -> None:
        """Raise ``ValueError`` for what would do nothing. Saved runs that have it load, and a resume may
        turn it on: this is for who asks for a new run."""
        if self.loss != "sampled" and self.sampled != SampledConfig():
            raise ValueError(
                "train.sampled.* is of sampled softmax: set train.loss = 'sampled', too"
            )
        self.sampled.check_asked()
        if not self.similarity.weight and self.similarity != SimilarityConfig():
            raise ValueError(
                "train.similarity.* is of the similarity loss: set train.similarity.weight, too"
            )


class LogConfig(Section):
    """What is written while training runs."""

    every: PositiveInt = 10
    """Steps between lines of ``metrics.jsonl`` and of the progress display."""
    tensorboard: bool = True
    """Write events for TensorBoard."""
    histograms: bool = True
    """Histograms of weights at each validation (TensorBoard)."""
    sample_tokens: Annotated[int, Field(ge=0)] = 60
    """Tokens of the text sampled at each validation; 0 samples nothing."""


class Config(Section):
    """Everything that decides a run."""

    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.model.norm == "batchnorm" and self.train.batch_size < 2:
            raise ValueError(
                "model.norm = 'batchnorm' normalises over the micro-batch: train.batch_size must be "
                "at least 2"
            )
        self._check_candidates()
        self._check_lazy_rows()
        if self.train.parallel.workers not in ("auto", 1):
            for setting, why in self.against_workers():
                raise ValueError(
                    f"train.parallel.workers = {self.train.parallel.workers}: {setting} {why}"
                )
        if self.train.pipeline.mode == "delayed":
            for setting, why in against_pipeline(self):
                raise ValueError(f"train.pipeline.mode = 'delayed': {setting} {why}")
        if self.train.optimizer_in_backward:
            for setting, why in against_early_update(self):
                raise ValueError(f"train.optimizer_in_backward: {setting} {why}")
        return self

    @property
    def tokens_seen(self) -> int:
        """Tokens of all steps together."""
        train = self.train
        return train.steps * train.batch_size * train.accumulate * self.model.context

    def _check_candidates(self) -> None:
        size, asked = self.model.vocab_size, self.train.sampled.candidates
        if self.train.loss == "sampled" and size is not None and asked >= size:
            raise ValueError(
                f"train.sampled.candidates = {asked} is no sample of a vocabulary of {size}: lower it, "
                "or use train.loss = 'exact'"
            )

    def _check_lazy_rows(self) -> None:
        train = self.train
        if train.lazy_rows != "on":
            return
        # What the optimizer in the backward pass does not go with is told of that.
        if not self.rows_can_idle and not train.optimizer_in_backward:
            raise ValueError(
                "train.lazy_rows = 'on', but the exact loss of a tied table uses every row in every step: "
                "set model.tie_embeddings = false or train.loss = 'sampled', or leave it out"
            )
        if train.momentum_outlasts_scale:
            raise ValueError(
                f"train.lazy_rows = 'on' needs train.betas whose first squared is below the second, not "
                f"{list(train.betas)}; leave one of them out"
            )

    def against_workers(self) -> Iterator[tuple[str, str]]:
        """Settings that do not go with several workers, and why."""
        if self.train.device not in ("auto", "cpu"):
            yield (
                f"train.device = {self.train.device!r}",
                "trains in one process; use torchrun for several",
            )
        yield from self.against_sharing()

    def against_sharing(self) -> Iterator[tuple[str, str]]:
        """Settings that need the whole step in one process, and why."""
        train = self.train
        if self.model.norm == "batchnorm":
            yield "model.norm = 'batchnorm'", "has statistics of whole micro-batches; use 'rmsnorm'"
        if train.loss == "sampled":
            yield "train.loss = 'sampled'", "draws for whole steps; use 'exact'"
        if train.similarity.weight:
            yield "train.similarity.weight", "draws for whole steps; set it to 0"
        if train.lazy_rows == "on":
            yield "train.lazy_rows = 'on'", "updates rows in one process; set it to off"
        if train.optimizer_in_backward:
            yield (
                "train.optimizer_in_backward",
                "needs the whole gradient in one process; leave it out",
            )

    @property
    def rows_can_idle(self) -> bool:
        """Whether a step may leave rows of a token table unused."""
        dense = self.train.loss == "exact" and self.model.tie_embeddings
        return not dense and not self.train.optimizer_in_backward

    def replace(self, **values: Any) -> Config:
        """A validated copy with dotted keys (``train__lr=…`` or a dict of ``{"train.lr": …}``) set."""
        from cllm.core.settings import merge

        return merge(self, {key.replace("__", "."): value for key, value in values.items()})


@cache
def known_keys(section: type[Section] = Config, prefix: str = "") -> tuple[str, ...]:
    """All dotted keys of the configuration, in order."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return tuple(keys)


def require_known(key: str) -> None:
    """Raise ``UsageError`` naming the nearest known key if ``key`` (dotted) is none."""
    from cllm.core.errors import nearest

    known = known_keys()
    if key not in known:
        tails = {k.rsplit(".", 1)[-1]: k for k in known}
        hint = nearest(key, known) or (f" (did you mean {tails[key]!r}?)" if key in tails else "")
        raise UsageError(f"unknown setting {key!r}{hint}; `cllm config show` lists all")
