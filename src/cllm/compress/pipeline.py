"""A run to a compressed model in one file: tables first, then layer by layer, then the score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cllm.compress.calibration import calibrate, layers_in_order
from cllm.compress.compressed import Compressed
from cllm.compress.layer import Piece, cast_layer, compress_layer, compress_table, keep
from cllm.compress.output_metric import OutputMetric
from cllm.compress.own_points import has_own_points, own_points
from cllm.compress.parts import PartsFolder
from cllm.compress.recovery import recover
from cllm.compress.settings import Settings
from cllm.compress.source import Source, score_on_validation
from cllm.core.errors import UserError
from cllm.core.settings import merge, to_toml
from cllm.model.table_statistics import table_statistics
from cllm.model.transformer import Transformer
from cllm.store.container import Container, Header, tensor_name, write_container
from cllm.training.progress import Progress


def compress(
    source: Source,
    settings: Settings,
    out: Path,
    progress: Progress,
    *,
    rates: dict[str, float] | None = None,
) -> Compressed:
    """Compress ``source`` into the file ``out``.

    ``rates``: bits a weight of single layers and tables (``grid = coded`` only), by parameter name. Each
    weight is kept on disk as it is done, in ``OUT.parts``: the same request, interrupted, goes on from
    there. Statistics of one layer's inputs are in memory at a time; where errors are weighed by the model,
    those of all layers' outputs as well. Raises ``UserError``.
    """
    model = source.model()
    folder = PartsFolder(out, _key(source, settings, rates))
    try:
        pieces = _pieces(source, model, settings, folder, progress, rates or {})
    except UserError:
        folder.remove_if_empty()
        raise
    model.load_state_dict({name: piece.values for name, piece in pieces.items()})
    for table in model.tables.values():
        table.after_step()
    bpb = score_on_validation(source, model, progress, "scoring what was compressed")
    recovery = None
    if settings.recover:
        pieces, recovery = _recover(source, model, settings, pieces, progress)
        recovery["bpb_before"] = bpb
        bpb = score_on_validation(source, model, progress, "scoring what was recovered")
    tensors = {
        tensor_name(name, part): tensor
        for name, piece in pieces.items()
        for part, tensor in sorted(piece.parts.items())
    }
    results: dict[str, Any] = {"base_bpb": source.base, "bpb": bpb}
    if recovery is not None:
        results["recovery"] = recovery
    header = Header(
        config=to_toml(merge(source.config, {"data.paths": ()})),
        source={"name": source.run.name, "step": source.step, "sha256": source.digest},
        method=settings.to_json(),
        weights={name: piece.stored for name, piece in pieces.items()},
        results=results,
    )
    size = write_container(out, header, tensors, source.data.tokenizer.to_json())
    folder.remove()
    return replace(_outcome(source, settings, out, size, pieces, bpb), recovery=recovery)


def _recover(
    source: Source,
    model: Transformer,
    settings: Settings,
    pieces: dict[str, Piece],
    progress: Progress,
) -> tuple[dict[str, Piece], dict[str, Any]]:
    """The pieces after recovery, which ``model`` then has, and what it found."""
    if not len(source.recovery):
        raise ValueError("the source was opened without text to recover on")
    found = recover(
        source.model(),
        model,
        pieces,
        source.recovery,
        progress,
        steps=settings.recover,
        rounding=settings.recover_codes,
    )
    _put(model, found.pieces)
    facts = {"divergence_before": found.before, "divergence": found.after, "step": found.step}
    return found.pieces, facts


def _pieces(
    source: Source,
    model: Transformer,
    settings: Settings,
    folder: PartsFolder,
    progress: Progress,
    rates: dict[str, float],
) -> dict[str, Piece]:
    """All weights, compressed, by name; the model's layers have been replaced on the way."""
    state = model.state_dict()
    linear = {f"{name}.weight" for name in layers_in_order(model)}
    tables = {f"{name}.weight" for name in model.tables}
    learned = {name for name, _ in model.named_parameters()}
    pieces: dict[str, Piece] = {}
    done = {name: piece for name in linear if (piece := folder.load(name)) is not None}
    outputs = None
    if settings.by_model and len(done) < len(linear):
        outputs = source.output_metrics(progress)
    with progress.stage("compressing", sum(state[name].numel() for name in linear)) as advance:
        for name in state:
            if name in tables:
                pieces[name] = folder.load(name) or round_table(
                    source, model, settings, name, rates
                )
                folder.save(name, pieces[name])
            elif name not in linear:
                pieces[name] = keep(state[name], settings, buffer=name not in learned)
        _put(model, pieces)
        pieces |= done
        _put(model, done)
        advance(sum(state[name].numel() for name in done))
        for name, piece in _layers(source, model, settings, set(done), rates, outputs):
            folder.save(name, piece)
            pieces[name] = piece
            advance(piece.values.numel())
    return {name: pieces[name] for name in state}


def _layers(
    source: Source,
    model: Transformer,
    settings: Settings,
    done: set[str],
    rates: dict[str, float],
    outputs: Mapping[str, OutputMetric] | None,
) -> Iterable[tuple[str, Piece]]:
    if settings.is_cast:
        for name in layers_in_order(model):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            yield f"{name}.weight", cast_layer(linear.weight.detach().float(), settings)
        return
    skip = {name.removesuffix(".weight") for name in done}
    for layer in calibrate(model, source.windows, skip=skip, outputs=outputs):
        name = f"{layer.name}.weight"
        piece = compress_layer(layer, settings, rates.get(name))
        with torch.no_grad():
            layer.linear.weight.copy_(piece.values)
        yield name, piece


def round_table(
    source: Source, model: Transformer, settings: Settings, name: str, rates: dict[str, float]
) -> Piece:
    """The token table ``name`` (a parameter's name) of ``model`` as ``settings`` store it, at its bits in
    ``rates`` if they are there."""
    table = model.tables[name.partition(".")[0]]
    if settings.table_as == "own":
        return own_points(table)
    with torch.no_grad():
        weight = table.core() if has_own_points(source.config) else table.weight
    plain = table.incidence is None and table.basis is None
    seen = table_statistics(model, source.data.train, limit=settings.tokens) if plain else None
    tied = model.head is None
    return compress_table(
        weight.detach().float(),
        settings,
        seen,
        head=tied or name.startswith("head"),
        look_up=tied or not name.startswith("head"),
        bits=rates.get(name),
    )


def _put(model: Transformer, pieces: dict[str, Piece]) -> None:
    state = model.state_dict()
    with torch.no_grad():
        for name, piece in pieces.items():
            state[name].copy_(piece.values)
    for table in model.tables.values():
        table.after_step()


def _key(source: Source, settings: Settings, rates: dict[str, float] | None) -> str:
    facts = [
        source.digest,
        settings.to_json(),
        hashlib.sha256(source.windows.tobytes()).hexdigest(),
        rates,
    ]
    return hashlib.sha256(json.dumps(facts).encode("ascii")).hexdigest()


def _outcome(
    source: Source,
    settings: Settings,
    out: Path,
    size: int,
    pieces: dict[str, Piece],
    bpb: float | None,
) -> Compressed:
    layers, count, stored = [], 0, 0
    sizes = Container.open(out).sizes()
    for name, piece in pieces.items():
        if piece.figures:
            facts = {"name": name, "kind": piece.stored.kind, "shape": piece.stored.shape}
            bits = 8 * sizes[name] / piece.stored.count
            layers.append(facts | {"bytes": sizes[name], "bits": bits} | piece.figures)
        if name.startswith("layers.") and len(piece.stored.shape) == 2:
            count, stored = count + piece.stored.count, stored + sizes[name]
    model = source.model()
    return Compressed(
        path=out,
        bytes=size,
        settings=settings,
        base=source.base,
        bpb=bpb,
        parameters=sum(p.numel() for p in model.parameters()),
        layer_parameters=count,
        layer_bytes=stored,
        layers=layers,
    )
