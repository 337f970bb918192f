"""Token tables in a run: their start, their reduction, and the figures that the report gives of them."""

from __future__ import annotations

from typing import Any

from cllm.core.config import Config
from cllm.core.errors import UserError
from cllm.model.embedding import Embedding
from cllm.model.factors import retained
from cllm.model.rebase import Rebased, rebase
from cllm.model.transformer import Transformer
from cllm.training.step import TrainStep

UNASKED_RANK = 128
"""Up to this rank a report has the basis's figures unasked: they take seconds there, and minutes at 384."""


def reduce_bases(model: Transformer, method: str) -> list[str]:
    """Rewrite the factors of every reduced table by lattice reduction; lines that say what came of it.

    The tables stay what they are. Raises ``UserError`` for a basis that cannot be reduced.
    """
    lines = []
    for name, table in model.tables.items():
        assert table.basis is not None, "only reduced tables have a basis"
        found = _rebased(table, method)
        # A composed core is linear in its pieces' vectors, so that these change as it does.
        table.weight.data.copy_(found.core)
        table.basis.data.copy_(found.basis)
        table.after_step()
        lines.append(f"{name} basis by {method}: {describe(found)}")
    return lines


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


def table_facts(model: Transformer, step: TrainStep, config: Config) -> dict[str, Any]:
    """Figures of the trained input table for the status and the report.

    ``retained`` is what the best table of half the width would keep of this one's energy, a measure of
    how far from low rank training has left it; a reduced basis has its figures before and after
    reduction.
    """
    embedding = model.embedding
    wide = config.model
    numbers = sum(p.numel() for table in model.tables.values() for p in table.parameters())
    dense = len(model.tables) * wide.d_model * (wide.vocab_size or 0)
    facts: dict[str, Any] = {
        "kind": wide.embedding.kind,
        "numbers": numbers,
        "of_dense": round(numbers / max(dense, 1), 4),
        "retained_at_half": round(retained(embedding.table(), max(wide.d_model // 2, 1)), 4),
    }
    if embedding.basis is not None:
        facts["rank"] = embedding.basis.shape[0]
        method = wide.embedding.reduction
        if method != "none" or facts["rank"] <= UNASKED_RANK:
            method = method if method != "none" else "lll"
            found = _rebased(embedding, method)
            facts["basis"] = found.before.to_json()
            facts[f"basis after {method}"] = found.after.to_json()
    if step.cores:
        computed, read = step.core_uses["computed"], step.core_uses["read"]
        facts["core_bytes"] = sum(core.nbytes for core in step.cores.values())
        facts["core_hit_rate"] = round(1 - computed / read, 4) if read else None
    if step.lazy is not None:
        facts["updated by rows"] = " and ".join(step.lazy.tables)
    return facts


def _rebased(table: Embedding, method: str) -> Rebased:
    assert table.basis is not None
    try:
        return rebase(table.weight.detach(), table.basis.detach(), method)
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"model.embedding.reduction = {method!r}: {error}") from error
