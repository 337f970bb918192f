"""Mixed precision by rate and distortion: one slope over layers and tables fits a file into a size."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from cllm.compress.compressed import Compressed
from cllm.compress.layer import keep
from cllm.compress.pipeline import compress
from cllm.compress.sensitivity import sensitivities, spread_bits
from cllm.compress.settings import Settings
from cllm.compress.source import Source
from cllm.core.errors import UserError
from cllm.core.settings import merge, to_toml
from cllm.store.container import Header, Stored, tensor_name, write_container
from cllm.training.progress import Progress

LEAST, MOST = 0.3, 10.0
"""Bits a weight: below, a matrix's own tables outweigh its integers."""
# Digits of sizes and offsets that an empty file does not have, for each tensor.
_DIGITS = 24


def allot(
    source: Source, settings: Settings, out: Path, progress: Progress, budget: int
) -> Compressed:
    """A file of at most ``budget`` bytes, the bits shared out so that no layer or table would gain more
    from another bit than the next.

    Raises ``UserError`` with the least possible where the budget is below it.
    """
    assert settings.table == "lattice", "bits are shared with the tables, too"
    fixed = _fixed_bytes(source, settings)
    items = sensitivities(source, progress)
    numbers = sum(item.count for item in items.values())
    least = fixed + int(LEAST * numbers / 8) + 1
    if budget < least:
        raise UserError(f"{budget:,} bytes are too few: the least possible is {least:,}")
    rates = spread_bits(items, 8.0 * (budget - fixed), least=LEAST, most=MOST)
    for name, bits in rates.items():
        progress.say(f"{name}: {bits:.2f} bits")
    mean = sum(rates[name] * item.count for name, item in items.items()) / numbers
    whole = replace(settings, bits=min(max(mean, 0.1), 12.0))
    return compress(source, whole, out, progress, rates=rates)


def _fixed_bytes(source: Source, settings: Settings) -> int:
    """Bytes of the file beside the integers of layers and tables, on the safe side."""
    model = source.model()
    learned = {name for name, _ in model.named_parameters()}
    state = model.state_dict()
    weights, tensors = {}, {}
    for name, tensor in state.items():
        table = name.removesuffix(".weight") in model.tables
        if name in learned and tensor.ndim == 2 and (table or name.startswith("layers.")):
            weights[name] = Stored(kind="coded", shape=tuple(tensor.shape))
            tensors[name] = torch.zeros(0, dtype=torch.uint8)
        else:
            piece = keep(tensor, settings, buffer=name not in learned)
            weights[name] = piece.stored
            tensors |= {tensor_name(name, part): value for part, value in piece.parts.items()}
    header = Header(
        config=to_toml(merge(source.config, {"data.paths": ()})),
        source={"name": source.run.name, "step": source.step, "sha256": source.digest},
        method=settings.to_json(),
        weights=weights,
        results={"base_bpb": source.base, "bpb": source.base},
    )
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "empty.cllm"
        size = write_container(path, header, tensors, source.data.tokenizer.to_json())
    return size + _DIGITS * (len(tensors) + 1)
