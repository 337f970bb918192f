"""A certificate: how many bits per byte compression will cost, said before anything is compressed.

Of every linear layer the profile of its metric gives the error to be expected (``expected``). How the
decoder, its scales and damping fare against that is measured on a few rows of the layer, what such an
error costs by putting in one drawn from the distribution that is expected: the divergence from the run's
own predictions, whose gradient is 0, so that nothing but the error's own cost is seen. All errors put in
at once give the whole rise. They are put in on the validation text that the file will be scored on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.compress.calibration import calibrate, layers_in_order
from cllm.compress.divergence import Judge
from cllm.compress.outlook import Outlook, outlook
from cllm.compress.pipeline import round_table
from cllm.compress.settings import Settings
from cllm.compress.source import Source
from cllm.core.errors import UsageError, UserError
from cllm.text.batches import evaluation_windows
from cllm.training.progress import Progress

WINDOWS = 24
"""Windows of validation text that a single layer is judged on."""
MOST = 160
"""Windows of it that all together are judged on."""
DRAWS = 3
"""Errors drawn for all layers at once."""
SURE = 2.0
"""Standard errors that the interval has on each side."""


@dataclass(frozen=True, kw_only=True)
class LayerForecast:
    """Of one layer: ``error`` of its outputs over their size, the decoder's ``gain`` (its error over that
    expected of nearest plane), and the ``rise`` in bits per byte that it causes by itself, with its
    standard error ``sigma``."""

    name: str
    error: float
    gain: float
    rise: float
    sigma: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The rise of validation text's bits per byte: ``rise``, and from ``low`` to ``high`` what to count on.

    ``tables``: the part that the token tables cause by themselves; they are rounded for it, layers not.
    """

    rise: float
    low: float
    high: float
    tables: float
    layers: list[LayerForecast]

    def sentence(self, base: float | None) -> str:
        """For people; ``base``: the run's own bits per byte."""
        share = "" if base is None else f" ({self.rise / base:+.2%} of {base:.4f})"
        return (
            f"predicted rise of the bits per byte: {self.rise:.4f}, between {self.low:.4f} and "
            f"{self.high:.4f}{share}"
        )


def forecast(source: Source, settings: Settings, progress: Progress, seed: int = 0) -> Forecast:
    """The rise to be expected of compressing ``source`` by ``settings``.

    Raises ``UsageError`` for a cast, pruning and recovery, which have no such profile, and ``UserError``
    for a run without validation text of a window at least.
    """
    check_predictable(settings)
    validation = source.data.validation
    ids, targets = _validation_windows(source)
    assert validation is not None
    tokens = validation.scored_tokens
    rate = tokens / max(validation.scored_bytes, 1) / math.log(2)
    model = source.model()
    judge = Judge(source.model(), source.model(), ids)
    generator = torch.Generator().manual_seed(seed)
    joint: list[dict[str, Tensor]] = [{} for _ in range(DRAWS)]
    found: list[tuple[Outlook, float, Tensor]] = []
    outputs = source.output_metrics(progress) if settings.by_model else None
    with progress.stage("predicting the rise", len(layers_in_order(model))) as advance:
        for layer in calibrate(model, source.windows, outputs=outputs):
            expected = outlook(layer, settings, generator)
            name = expected.name
            for draw in joint:
                draw[name] = expected.draw(generator)
            # The next layers see what an error in this one makes of their inputs.
            with torch.no_grad():
                layer.linear.weight.copy_(joint[0][name])
            error = expected.share([draw[name] for draw in joint], layer.seen)
            found.append((expected, error, judge.each({name: joint[0][name]}, WINDOWS)))
            advance(1)
        tables = _tables(source, settings)
        alone = judge.each(tables, WINDOWS)
        draws = [judge.with_loss(tables | draw, targets) for draw in joint]
    divergence = float(torch.stack([d for d, _ in draws]).mean())
    losses = torch.stack([rise for _, rise in draws])
    mean = float(losses.mean())
    # What a divergence costs on this text, which the run need not predict as surely as it thinks.
    price = rate * mean / max(divergence, 1e-300)
    layers = [
        LayerForecast(
            name=one.name,
            error=error,
            gain=one.gain,
            rise=price * float(each.mean()),
            sigma=_sigma(each, one.spread, price, rate, tokens),
        )
        for one, error, each in found
    ]
    costs = [float(each.mean()) for *_, each in found]
    gains = math.hypot(*(c * o.spread for c, (o, *_) in zip(costs, found, strict=True)))
    drawn = float(losses.mean(dim=1).std()) * (1 + 1 / DRAWS) ** 0.5
    sigma = math.hypot(mean * gains / max(sum(costs), 1e-300), drawn, _noise(divergence, tokens))
    return Forecast(
        rise=mean * rate,
        low=(mean - SURE * sigma) * rate,
        high=(mean + SURE * sigma) * rate,
        tables=price * float(alone.mean()),
        layers=layers,
    )


def check_predictable(settings: Settings) -> None:
    """Raise ``UsageError`` where nothing can be said before compressing."""
    if settings.is_cast or settings.prune or settings.recover:
        raise UsageError(
            "--predict knows the error of rounding to a grid: leave out --prune, --recover and casts"
        )


def _validation_windows(source: Source) -> tuple[Tensor, Tensor]:
    """Ids and targets (W, T) of the whole windows of validation text, ``MOST`` at most."""
    validation, context = source.data.validation, source.config.model.context
    if validation is None or len(validation) <= context:
        raise UserError(f"{source.run.path} has no validation text whose rise could be told")
    windows = min(MOST, (len(validation) - 1) // context)
    ids, targets = next(evaluation_windows(validation, context, windows))
    return torch.as_tensor(ids), torch.as_tensor(targets)


def _sigma(each: Tensor, spread: float, price: float, rate: float, tokens: int) -> float:
    """Standard error of a layer's rise, from its windows, its gain, and the text's own chance."""
    cost = float(each.mean())
    windows = float(each.std()) / len(each) ** 0.5 if len(each) > 1 else cost
    return math.hypot(price * math.hypot(windows, cost * spread), rate * _noise(cost, tokens))


def _noise(cost: float, tokens: int) -> float:
    """Standard error of the mean loss over ``tokens``: of a prediction that is ``cost`` nats away, the
    loss of single tokens changes with variance 2 · ``cost``."""
    return math.sqrt(2 * max(cost, 0.0) / max(tokens, 1))


def _tables(source: Source, settings: Settings) -> dict[str, Tensor]:
    """Token tables as they will be, by name."""
    model = source.model()
    names = [f"{name}.weight" for name in model.tables]
    return {name: round_table(source, model, settings, name, {}).values for name in names}
