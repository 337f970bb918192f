"""What ``cllm bench embed`` trains: kinds of token table, starts, learning rates, seeds and budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from cllm.core.config import Config
from cllm.core.settings import build

RATES = (3e-3, 2e-3, 5e-3)
"""Learning rates tried for each table, each start tuned for itself; the first is the default."""
HIGHER = 8e-3
"""Tried, too, where the highest of them is the best."""
SEEDS = (0, 1, 2)
DROPOUTS = (0.0, 0.1, 0.2, 0.3)
"""Dropouts of embeddings and residuals, tried in turn on a text where learning ends early without one."""
LEARNING_UNTIL = 0.9
"""The share of the steps before which the best weights say that learning ended early."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Tokens seen, and the shares of the steps at which the corpus start is judged."""

    name: str
    tokens: int
    required_share: float
    aim_share: float
    required_rank64: float
    """How far above dense random's bits per byte rank 64 from the corpus may end, as a share."""
    required_rank32: float


BUDGETS = (
    Budget(
        name="2.5 M",
        tokens=2_500_000,
        required_share=0.6,
        aim_share=0.4,
        required_rank64=0.0,
        required_rank32=0.01,
    ),
    Budget(
        name="10 M",
        tokens=10_000_000,
        required_share=0.85,
        aim_share=0.65,
        required_rank64=0.015,
        required_rank32=0.04,
    ),
)
QUICK = replace(BUDGETS[0], name="quick", tokens=4096)

VALIDATIONS = 20
"""Of a training that is compared. The loss of held-out text rises in time on a text that is seen again,
sooner for what learns faster, so that ends alone would compare how many passes were too many."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A token table: fields of ``model.embedding``, what else trains it (fields of ``train``, dotted), and
    the share of the budget's steps it gets."""

    name: str
    start: str
    fields: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    training: dict[str, Any] = field(default_factory=dict)

    def config(
        self,
        paths: tuple[str, ...],
        budget: Budget,
        lr: float,
        seed: int,
        *,
        dtype: str,
        dropout: float,
        validations: int,
        quick: bool = False,
    ) -> Config:
        """The configuration of one training, which is validated so often (and as it ends); the weights
        that do best then are scored."""
        base: dict[str, Any] = {"model.preset": "nano" if quick else "tiny"}
        if quick:
            base |= {"tokenizer.vocab_size": 300, "model.d_model": 64}
            base |= {"train.compile": "off", "train.attention": "matmul"}
        whole = build(base)
        a_step = whole.train.batch_size * whole.model.context
        steps = max(round(self.share * budget.tokens / a_step), 1)
        settings = base | {
            "data.paths": paths,
            "train.steps": steps,
            "train.dtype": dtype,
            "train.lr": lr,
            "train.seed": seed,
            "train.eval_every": max(steps // validations, 1),
            "train.checkpoint_every": steps,
            "log.sample_tokens": 0,
            "log.tensorboard": False,
            "model.embedding.init": self.start,
            "model.embedding_dropout": dropout,
            "model.residual_dropout": dropout,
        }
        settings |= {f"model.embedding.{name}": value for name, value in self.fields.items()}
        settings |= {f"train.{name}": value for name, value in self.training.items()}
        return build(settings)


NORMAL = Case(name="dense", start="normal")
CORPUS = Case(name="dense", start="corpus")
RANK64 = Case(name="reduced 64", start="corpus", fields={"kind": "reduced", "rank": 64})
RANK32 = Case(name="reduced 32", start="corpus", fields={"kind": "reduced", "rank": 32})
COMPOSED = Case(name="composed", start="corpus", fields={"kind": "composed"})
QUICK_CASES = (NORMAL, CORPUS, RANK64)


def shortened(budget: Budget) -> list[Case]:
    """The corpus start with the required and with the aimed share of the steps."""
    shares = (budget.required_share, budget.aim_share)
    return [Case(name="dense", start="corpus", share=share) for share in shares]


def main_cases(budget: Budget) -> list[Case]:
    """What the claims are about, in the order in which it is trained."""
    return [NORMAL, CORPUS, *shortened(budget), RANK64, RANK32, COMPOSED]


def other_cases() -> list[Case]:
    """What is there to be compared with."""
    own = {"kind": "composed", "own_vectors": False}
    both = {"kind": "composed+reduced", "rank": 64}
    from_codes = {"pieces_from": "codes"}
    snapped = {"kind": "reduced", "rank": 64, "lattice": "reduced"}
    return [
        Case(name="reduced 64", start="normal", fields=dict(RANK64.fields)),
        Case(name="reduced 32", start="normal", fields=dict(RANK32.fields)),
        Case(name="composed", start="normal", fields=dict(COMPOSED.fields)),
        Case(name="dense", start="crystal"),
        Case(name="composed, no own vectors", start="corpus", fields=own),
        Case(name="composed, reduced 64", start="corpus", fields=both),
        Case(name="dense on Z", start="corpus", fields={"lattice": "z"}),
        Case(name="dense on E8", start="corpus", fields={"lattice": "e8"}),
        Case(name="reduced 64 on its lattice", start="corpus", fields=snapped),
        Case(name="composed from codes", start="corpus", fields=COMPOSED.fields | from_codes),
        *_taught(),
    ]


def speed_cases() -> list[Case]:
    """Tables that differ in what a step computes, the dense one first; starts and shares do not matter."""
    found = dict[str, Case]()
    for case in [CORPUS, RANK64, RANK32, COMPOSED, *other_cases()]:
        found.setdefault(case.name, case)
    return list(found.values())


def _taught() -> list[Case]:
    """The dense table, trained on other than the exact loss alone."""
    sampled = {"loss": "sampled", "sampled.candidates": 512}
    samplers = {
        "": "unigram",
        " by code": "divisor",
        " by rank": "log-uniform",
        " of all": "uniform",
    }
    return [
        *(
            Case(
                name=f"dense, 512 candidates{how}",
                start="corpus",
                training=sampled | {"sampled.sampler": sampler},
            )
            for how, sampler in samplers.items()
        ),
        *(
            Case(
                name=f"dense, similarity {weight:g}",
                start=start,
                training={"similarity.weight": weight},
            )
            for weight in (0.1, 1.0)
            for start in ("corpus", "normal")
        ),
    ]
