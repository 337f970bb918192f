"""What changes from step to step by plan: the learning rate (a linear warm-up, then one of five shapes)
and the weight of the similarity loss."""

from __future__ import annotations

import math

from cllm.core.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of the optimizer step that leads from ``step`` to ``step`` + 1 (steps count from 0).

    The first ``warmup`` steps rise in equal parts and the last of them has the full rate; the last step
    of ``linear``, ``cosine`` and ``wsd`` has ``min_lr`` times the full rate.
    """
    warmup, last = config.warmup_steps, config.steps - 1
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(last - warmup, 1) if last > warmup else 1.0
    return config.lr * _share(config, min(done, 1.0), step)


def similarity_weight(config: TrainConfig, step: int) -> float:
    """The weight of the similarity loss in the step that leads from ``step`` to ``step`` + 1: it falls in
    a line, and is 0 from the share ``similarity.until`` of the steps on."""
    pulled = config.similarity
    return pulled.weight * max(1.0 - step / (pulled.until * config.steps), 0.0)


def _share(config: TrainConfig, done: float, step: int) -> float:
    """The share of the full rate after the part ``done`` (0 to 1) of the steps behind the warm-up."""
    span = 1.0 - config.min_lr
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - span * done
        case "cosine":
            return config.min_lr + span * 0.5 * (1.0 + math.cos(math.pi * done))
        case "wsd":
            # Warmup-stable-decay (Hu et al. 2024), with a linear decay.
            return 1.0 - span * max(0.0, 1.0 - (1.0 - done) / config.decay_share)
        case "step":
            drops = int(step / (config.step_every * config.steps) + 1e-9)
            return max(config.step_factor**drops, config.min_lr)
