"""Token tables in a run: their start, their reduction, and the figures that the report gives of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor

from cllm.core.config import Config
from cllm.core.errors import UserError
from cllm.core.model_config import EmbeddingConfig
from cllm.model.factors import retained
from cllm.model.rebase import Rebased, rebase
from cllm.model.table_metric import table_metric
from cllm.model.table_statistics import table_statistics
from cllm.model.transformer import Transformer
from cllm.text.packed import PackedTokens
from cllm.training.step import TrainStep

UNASKED_RANK = 128
"""Up to this rank a report has the basis's figures unasked: they take seconds there, and minutes at 384."""


def reduce_bases(
    model: Transformer,
    config: EmbeddingConfig,
    tokens: PackedTokens,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Rewrite the factors of every reduced table by the configured lattice reduction; figures of the bases
    before and after, for the status and the report. ``say`` is told a line of each.

    The tables stay what they are: coordinates that are snapped to integers are carried along as these.
    ``tokens``: training text, for the metric of what errors cost. Raises ``UserError`` for a basis that
    cannot be reduced.
    """
    facts, metrics = dict[str, Any](), metrics_of(model, config, tokens)
    method, under = config.reduction, config.reduction_metric
    for name, table in model.tables.items():
        assert table.basis is not None, "only reduced tables have a basis"
        # A composed core is linear in its pieces' vectors, so that these change as it does.
        core = table.weight if table.snap is None else table.core()
        found = _rebased(core, table.basis, method, metrics.get(name))
        table.weight.data.copy_(found.core)
        table.basis.data.copy_(found.basis)
        table.after_step()
        by = method if name not in metrics else f"{method} under the metric of {under} states"
        say(f"{name} basis by {by}: {describe(found)}")
        facts[f"{name} basis at the start"] = found.before.to_json()
        facts[f"{name} basis at the start, after {by}"] = found.after.to_json()
    return facts


def metrics_of(
    model: Transformer, config: EmbeddingConfig, tokens: PackedTokens
) -> dict[str, np.ndarray]:
    """The metric (D, D) for the basis of each table, by its name; none where it is the identity.

    ``hidden``: what an error costs where the table scores, the mean with the identity where it is looked up
    in, too (``table_metric``); a table that is only looked up in has the identity. Raises ``UserError``
    where the hidden states tell nothing.
    """
    if config.reduction_metric == "identity":
        return {}
    moment = table_statistics(model, tokens).moment
    try:
        return {
            name: table_metric(moment, head=True, look_up=table is model.embedding)
            for name, table in model.tables.items()
            if table is model.output
        }
    except ValueError as error:
        raise UserError(f"model.embedding.reduction_metric = 'hidden': {error}") from error


def describe(found: Rebased) -> str:
    """What a reduction did, in one line."""
    before, after = found.before, found.after
    kind = "λ1" if after.shortest_is_exact else "shortest vector found"
    profiles = [f"{facts.profile[0]:.2f}…{facts.profile[-1]:.2f}" for facts in (before, after)]
    text = (
        f"orthogonality defect 2^{before.log2_defect:.1f} → 2^{after.log2_defect:.1f}, profile "
        f"{' → '.join(profiles)} (log2), {kind} {before.shortest:.4g} → {after.shortest:.4g}"
    )
    if found.is_trivial:
        text += "; it only reordered rows, which were orthogonal enough before"
    return text


def table_facts(
    model: Transformer, step: TrainStep, config: Config, tokens: PackedTokens
) -> dict[str, Any]:
    """Figures of the trained input table for the status and the report.

    ``retained`` is what the best table of half the width would keep of this one's energy, a measure of
    how far from low rank training has left it; a reduced basis has its figures before and after
    reduction, under the configured metric (``tokens``: training text for it).
    """
    embedding = model.embedding
    wide = config.model
    numbers = sum(p.numel() for table in model.tables.values() for p in table.parameters())
    dense = len(model.tables) * wide.d_model * (wide.vocab_size or 0)
    facts: dict[str, Any] = {
        "kind": wide.embedding.kind,
        "numbers": numbers,
        "bytes": sum(
            t.nbytes for table in model.tables.values() for t in table.state_dict().values()
        ),
        "of_dense": round(numbers / max(dense, 1), 4),
        "retained_at_half": round(retained(embedding.table(), max(wide.d_model // 2, 1)), 4),
    }
    if embedding.basis is not None:
        facts["rank"] = embedding.basis.shape[0]
        method = wide.embedding.reduction
        # Where there is no fpylll, nothing that nobody asked for may need it.
        unasked = facts["rank"] <= UNASKED_RANK and find_spec("fpylll") is not None
        if method != "none" or unasked:
            method = method if method != "none" else "lll"
            metrics = metrics_of(model, wide.embedding, tokens)
            if "embedding" in metrics:
                facts["metric of the basis"] = f"{wide.embedding.reduction_metric} states"
            found = _rebased(embedding.weight, embedding.basis, method, metrics.get("embedding"))
            facts["basis"] = found.before.to_json()
            facts[f"basis after {method}"] = found.after.to_json()
    if step.cores:
        computed, read = step.core_uses["computed"], step.core_uses["read"]
        facts["core_bytes"] = sum(core.nbytes for core in step.cores.values())
        facts["core_hit_rate"] = round(1 - computed / read, 4) if read else None
    if step.lazy is not None:
        facts["updated by rows"] = " and ".join(step.lazy.tables)
    return facts


def _rebased(core: Tensor, basis: Tensor, method: str, metric: np.ndarray | None) -> Rebased:
    try:
        return rebase(core.detach(), basis.detach(), method, metric)
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"model.embedding.reduction = {method!r}: {error}") from error
    except ModuleNotFoundError as error:
        raise UserError(
            f"model.embedding.reduction = {method!r} needs {error.name}: pip install {error.name}"
        ) from error
