"""What one process computes and holds: times and bytes by layer, from traces of two and three layers.

Layers are alike, so that whatever a step does grows in a line with their number; a model of a hundred
layers is planned as fast as one of three.
"""

from __future__ import annotations

from dataclasses import dataclass

from cllm.core.config import Config
from cllm.training.choose import DTYPES
from cllm.training.plan.roofline import Rates, peak_bytes, step_seconds
from cllm.training.plan.trace import Product, StepTrace, traced

FEW, MORE = 2, 3
"""Layers that are traced."""
MASTER = 4
"""Bytes of a weight that the optimizer holds, of a summed gradient and of a moment."""


@dataclass(frozen=True)
class Line:
    """A figure that is ``fixed`` plus ``layer`` for each layer."""

    fixed: float
    layer: float

    def of(self, layers: float) -> float:
        """The figure of that many layers."""
        return self.fixed + layers * self.layer


@dataclass(frozen=True)
class Peak:
    """The most of two figures that grow with the layers: ``saved`` for the backward pass, and what is held
    when it ends."""

    saved: Line
    closing: Line

    def of(self, layers: float) -> float:
        """The figure of that many layers."""
        return max(self.saved.of(layers), self.closing.of(layers))


@dataclass(frozen=True, kw_only=True)
class Work:
    """One process's share: a micro-batch, and the end of a step.

    Seconds: ``micro`` (forward and backward), ``end`` (clipping, optimizer). Numbers: ``parameters``
    (learned), ``arena`` (with padding). Bytes: ``activations`` at their most while a micro-batch is
    computed (logits among them), ``temporary`` of the end, ``logits`` alone, ``boundary`` of a
    micro-batch's hidden vectors. ``flops`` of a micro-batch.
    """

    config: Config
    micro: Line
    end: Line
    parameters: Line
    arena: Line
    activations: Peak
    temporary: Line
    flops: Line
    logits: int
    boundary: int
    compute_width: int

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.config.model.n_layers

    @property
    def weight_bytes(self) -> int:
        """Bytes a parameter of the weights: the optimizer's and, in low precision, their copy."""
        return MASTER + (self.compute_width if self.compute_width < MASTER else 0)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes a parameter of moments and of the mask of weight decay."""
        return MASTER * (1 + {"adamw": 2, "sgd": 1}[self.config.train.optimizer])


def with_rows(config: Config, rows: int) -> Config:
    """``config`` with micro-batches of ``rows`` windows."""
    return config.replace(**{"train.batch_size": rows})


def products_of(config: Config) -> list[Product]:
    """The matrix products of a step, each shape once."""
    trace = _trace(config, FEW)
    both = (*trace.micro.operations, *trace.end.operations)
    return list(dict.fromkeys(op.product for op in both if op.product is not None))


def work_of(config: Config, rates: Rates) -> Work:
    """The work of ``config`` (resolved) with its micro-batch on a device of these rates."""
    compiled = config.train.compile == "on"
    few, more = _trace(config, FEW), _trace(config, MORE)

    def line(small: float, large: float) -> Line:
        slope = (large - small) / (MORE - FEW)
        return Line(small - FEW * slope, slope)

    model, train = config.model, config.train
    assert model.vocab_size is not None
    assert isinstance(train.loss_chunk, int)
    width = DTYPES[train.dtype].itemsize
    rows = train.batch_size * model.context
    return Work(
        config=config,
        micro=line(*(step_seconds(t.micro, rates, compiled) for t in (few, more))),
        end=line(*(step_seconds(t.end, rates, compiled) for t in (few, more))),
        parameters=line(few.parameters, more.parameters),
        arena=line(few.arena, more.arena),
        activations=Peak(*map(line, *(peak_bytes(t.micro, compiled) for t in (few, more)))),
        temporary=line(*(peak_bytes(t.end, compiled)[0] for t in (few, more))),
        flops=line(few.micro.flops, more.micro.flops),
        logits=min(train.loss_chunk or rows, rows) * model.vocab_size * width,
        boundary=rows * model.d_model * width,
        compute_width=width,
    )


def _trace(config: Config, layers: int) -> StepTrace:
    return traced(config.replace(**{"model.n_layers": layers, "model.preset": None}))
