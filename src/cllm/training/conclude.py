"""The end of a training run: the test split, looked at once, samples, and the facts of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch

from cllm import __version__
from cllm.core.config import Config
from cllm.core.machine import machine
from cllm.model.transformer import parameter_count
from cllm.store import checkpoint as checkpoints
from cllm.store.run import RunDirectory
from cllm.text.dataset import Dataset
from cllm.training.evaluate import Evaluation
from cllm.training.samples import sample_texts
from cllm.training.trainer import DivergedError, Trainer

SAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How training ended: ``state`` is ``finished`` or ``stopped early``; scores of the best weights."""

    run: RunDirectory
    state: str
    validation: Evaluation | None
    test: Evaluation | None
    samples: Sequence[str]

    def lines(self) -> list[str]:
        """What a person wants to know when training has ended."""
        return [
            f"{name}: {found.bpb:.4f} bits per byte (loss {found.loss:.4f} nats per token, "
            f"perplexity {found.perplexity:.1f}, {found.bytes:,} bytes held out)"
            for name, found in (("validation", self.validation), ("test", self.test))
            if found is not None
        ]


def conclude(trainer: Trainer, state: str) -> Outcome:
    """Load the best weights, score validation and test with them, and let them write.

    Raises ``DivergedError`` where weights or scores are not finite.
    """
    standing, run, dataset = trainer.standing, trainer.run, trainer.dataset
    trainer.step.settle()
    at = standing.best_step if standing.best_step >= 0 else standing.step
    if at != standing.step:
        best = checkpoints.load(run.path, "best", with_optimizer=False)
        trainer.model.load_state_dict(best.weights)
        trainer.step.refresh()
    _check_finite(all(bool(p.isfinite().all()) for p in trainer.model.parameters()), trainer.config)
    scores: dict[str, Evaluation | None] = {}
    for split in ("validation", "test"):
        scores[split] = trainer.evaluate(split) if getattr(dataset, split) is not None else None
    losses = [score.loss for score in scores.values() if score is not None]
    _check_finite(all(map(math.isfinite, losses)), trainer.config)
    length = trainer.config.log.sample_tokens
    texts: list[str] = []
    if length:
        texts = sample_texts(trainer.model, dataset.tokenizer, count=SAMPLES, tokens=length)
    # Written last and together, so that a run killed above and resumed has these lines once.
    if not standing.step and (first := scores["validation"]) is not None:
        # No step was made that would have been followed by it.
        trainer.metrics.write(at, "validation", **first.to_json())
    if (test := scores["test"]) is not None:
        trainer.metrics.write(at, "test", **test.to_json())
        trainer.board.scalars(at, {"test/bpb": test.bpb, "test/loss": test.loss})
    for text in texts:
        trainer.metrics.write(at, "sample", prompt="", text=text, final=True)
    return Outcome(
        run=run,
        state=state,
        validation=scores["validation"],
        test=scores["test"],
        samples=tuple(texts),
    )


def _check_finite(found: bool, config: Config) -> None:
    """Raises ``DivergedError`` unless what was ``found`` is finite."""
    if not found:
        what = "training ended with weights that are not finite, or whose loss is not"
        raise DivergedError(what, config.train)


def first_facts(
    config: Config, dataset: Dataset, command: str, parent: RunDirectory | None
) -> dict[str, Any]:
    """What the run's status keeps of how it began, for lists and the report."""
    report, here = dataset.report, machine()
    names = [str(source["name"]) for source in report.sources[:5]]
    if report.source_count > len(names):
        names.append(f"and {report.source_count - len(names)} more")
    corpus: dict[str, Any] = {
        "sources": ", ".join(names),
        "sha256": report.sha256,
        "bytes": report.bytes,
        "documents": report.documents,
        "split_by": report.split,
        "bytes_per_token": round(report.bytes_per_token, 3),
    }
    corpus |= {f"{name}_tokens": split.tokens for name, split in report.splits.items()}
    facts: dict[str, Any] = {
        "parameters": parameter_count(config.model),
        "corpus": corpus,
        "machine": {
            "processor": here.cpu,
            "threads": config.train.threads,
            "instruction_sets": list(here.instruction_sets),
            "system": here.system,
        },
        "versions": {
            "cllm": __version__,
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    if command:
        facts["command"] = command
    if parent is not None:
        facts["parent"] = str(parent.path)
    return facts
