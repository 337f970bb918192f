"""A new run from an existing one, with its token tables reduced: what ``cllm reduce`` does."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from cllm.core.config import Config
from cllm.core.errors import SettingError, UsageError, UserError, value_errors_as
from cllm.core.settings import load_whole, merge, to_toml
from cllm.model.embedding import Embedding
from cllm.model.factors import rank_for, retained
from cllm.model.restored import restored
from cllm.model.transformer import Transformer
from cllm.store import checkpoint as checkpoints
from cllm.store import steps
from cllm.store.draft import Draft
from cllm.store.metrics import read_lines
from cllm.store.run import RunDirectory
from cllm.text.dataset import load_prepared
from cllm.training.build import build
from cllm.training.conclude import Outcome, first_facts
from cllm.training.draw_sources import draws_of
from cllm.training.progress import Progress
from cllm.training.session import train_run
from cllm.training.snapshot import Standing
from cllm.training.step import TrainStep
from cllm.training.tables import reduce_bases


def reduce_run(
    path: Path | str,
    progress: Progress,
    *,
    rank: int | None = None,
    retain: float | None = None,
    reduction: str = "none",
    metric: str = "identity",
    then_train: int = 0,
    out: Path | str | None = None,
    command: str = "",
) -> Outcome:
    """Give a run's model tables of ``rank``, or of the least rank that retains the share ``retain``.

    The factors begin as the best approximation of the trained table (its principal axes) and are
    rewritten by lattice ``reduction`` (``lll``, ``bkz``, ``hkz`` or ``none``), which changes no entry of
    the table; ``metric``, ``identity`` or ``hidden``, says what is short. ``then_train``: further steps in
    the reduced space. The result is a run of its own with the parent's data. With neither ``rank`` nor
    ``retain``, a run whose tables are reduced already keeps its factors.

    Raises ``UserError`` for the user's mistakes; nothing half-made stays behind.
    """
    parent = RunDirectory.open(path)
    config = load_whole(parent.config)
    if rank is not None and retain is not None:
        raise UsageError("give a rank or a share to retain, not both")
    if metric != "identity" and reduction == "none":
        raise UsageError(
            "--metric is of a lattice reduction: give --reduction lll, bkz or hkz, too"
        )
    source = restored(config.model, checkpoints.load_weights(Path(path)), path)
    with torch.no_grad():
        tables = {name: table.table() for name, table in source.tables.items()}
    _check_tables(tables, path)
    keep = rank is None and retain is None
    if keep and source.embedding.basis is not None and reduction == "none" and not then_train:
        raise UsageError("nothing is asked for: give --rank, --retain, --reduction or --then-train")
    config = _reduced(
        config, source.embedding, tables["embedding"], rank, retain, (reduction, metric)
    )
    with value_errors_as(SettingError):
        config.model.embedding.check_reduction()
    if then_train:
        config = merge(config, {"train.steps": then_train, "train.warmup": None})
    with Draft(out, corpus=f"{parent.name}-reduced") as draft:
        shutil.copytree(parent.data, draft.run.data)
        shutil.copy2(parent.tokenizer, draft.run.tokenizer)
        dataset = load_prepared(draft.run.data)
        model, step = build(config, draws_of(config, dataset, progress))
        _take_over(source, model, step, tables, keep=keep)
        _say_retained(progress, model, tables)
        before = _validated(parent, Path(path))
        if before is not None:
            progress.say(f"{path}: {before:.4f} bits per byte of validation text")
        rebased = {}
        if reduction != "none":
            rebased = reduce_bases(model, config.model.embedding, dataset.train, progress.say)
        step.refresh()
        draft.run.write_config(to_toml(config))
        run = draft.commit()
    run.note(**first_facts(config, dataset, command, parent), rebased=rebased)
    dataset = load_prepared(run.data)
    return train_run(config, run, dataset, model, step, Standing(), progress, fit=then_train > 0)


def _validated(parent: RunDirectory, path: Path) -> float | None:
    """Bits per byte of the run's best weights, or of the checkpoint that ``path`` is, if it has them."""
    _, step = steps.locate(path)
    if step is None:
        found = parent.status().facts.get("validation_bpb")
        return None if found is None else float(found)
    lines = [line for line in read_lines(parent.metrics) if line["kind"] == "validation"]
    return next((float(line["bpb"]) for line in lines if line["step"] == step), None)


def _check_tables(tables: dict[str, torch.Tensor], path: Path | str) -> None:
    """Raises ``UserError`` for tables of which no factors can be made."""
    for name, table in tables.items():
        spoiled = int((~torch.isfinite(table)).sum())
        if spoiled:
            raise UserError(
                f"{spoiled:,} entries of the {name} of {path} are NaN or infinite; name an earlier "
                "checkpoint of the run, or train it anew with a smaller train.lr"
            )
        if not table.any():
            raise UserError(f"the {name} of {path} is zero: there is nothing to reduce")


def _reduced(
    config: Config,
    embedding: Embedding,
    table: torch.Tensor,
    rank: int | None,
    retain: float | None,
    reduction: tuple[str, str],
) -> Config:
    if retain is not None:
        try:
            rank = rank_for(table, retain)
        except ValueError as error:
            raise UsageError(str(error)) from error
    kept = embedding.basis.shape[0] if embedding.basis is not None else None
    if rank is None and kept is None:
        raise UsageError("the run's table has no basis yet: give --rank N or --retain SHARE")
    kind = "composed+reduced" if config.model.embedding.is_composed else "reduced"
    changes = {
        "model.embedding.kind": kind,
        "model.embedding.rank": rank if rank is not None else kept,
        "model.embedding.reduction": reduction[0],
        "model.embedding.reduction_metric": reduction[1],
        "model.preset": None,
    }
    return merge(config, changes)


def _take_over(
    source: Transformer,
    model: Transformer,
    step: TrainStep,
    tables: dict[str, torch.Tensor],
    *,
    keep: bool,
) -> None:
    """The parent's weights; its tables as they are (``keep``) or onto factors of another rank."""
    weights = source.state_dict()
    if not keep:
        skip = tuple(f"{name}.{part}" for name in tables for part in ("weight", "basis"))
        weights = {name: tensor for name, tensor in weights.items() if name not in skip}
    missing = model.load_state_dict(weights, strict=keep)
    assert not missing.unexpected_keys
    if not keep:
        for name, table in model.tables.items():
            table.set_table(tables[name])


def _say_retained(progress: Progress, model: Transformer, tables: dict[str, torch.Tensor]) -> None:
    for name, table in model.tables.items():
        assert table.basis is not None
        rank, wanted = table.basis.shape[0], tables[name]
        with torch.no_grad():
            lost = float((table.table() - wanted).square().sum() / wanted.square().sum())
        progress.say(
            f"{name}: rank {rank} of {wanted.shape[1]} retains {1 - lost:.2%} of the table's energy "
            f"(the best of this rank: {retained(wanted, rank):.2%})"
        )
