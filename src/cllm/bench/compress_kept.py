"""What ``cllm bench compress`` measured, kept in the user's cache, and measured where it is not there."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from cllm.bench.compress_cases import RECOVERY
from cllm.bench.compress_peers import Rounded
from cllm.compress.calibration import calibrate
from cllm.compress.certificate import forecast
from cllm.compress.pipeline import compress
from cllm.compress.problem import objective
from cllm.compress.settings import Settings
from cllm.compress.source import Source, open_source, score_on_validation
from cllm.core.atomic import write_json
from cllm.core.errors import UserError
from cllm.core.machine import cache_dir, machine
from cllm.store.run import RunDirectory
from cllm.training.progress import Silent

FORMAT = 3
"""Raised when compression changes so that kept figures no longer stand for it."""

Figures = dict[str, Any]


class Kept:
    """The figures of one run. ``until``: nothing new is begun after this ``time.monotonic()``.

    ``changes``: settings of a quick bench, those that are not set by a case (``recover``) apart.
    """

    def __init__(self, path: Path, changes: dict[str, int], until: float) -> None:
        self.path, self.changes, self.until = path, changes, until

    @cached_property
    def source(self) -> Source:
        """The run, opened when it is first needed."""
        opened = self._changed(Settings(recover=RECOVERY))
        return open_source(self.path, opened, Silent())

    def figures(self, settings: Settings) -> Figures | None:
        """Of the run compressed by ``settings``; ``None`` if there is no time left to measure."""
        changed = self._changed(settings)
        return self._recall(changed.to_json(), lambda: self._measure(changed))

    def times(self, settings: Settings) -> Figures | None:
        """Seconds (``wall``, ``processor``) and ``threads`` of compressing by ``settings``, reading the run
        and its text apart; ``None`` if there is no time left to measure."""
        changed = self._changed(settings)
        facts = {"times": changed.to_json(), "on": [machine().cpu, torch.get_num_threads()]}
        return self._recall(facts, lambda: self._time(changed))

    @property
    def parameters(self) -> int:
        """Of the run, as it says itself; 0 where it does not."""
        return int(RunDirectory.open(self.path).status().facts.get("parameters", 0))

    def peer(self, name: str, bits: int, one: Callable[[Source, int], Rounded]) -> Figures | None:
        """Of the run with layers as a peer rounds them. Raises what ``one`` raises."""
        facts = {"peer": name, "bits": bits} | self.changes
        return self._recall(facts, lambda: self._measure_peer(one(self.source, bits)))

    def _changed(self, settings: Settings) -> Settings:
        changes = dict(self.changes)
        if not settings.recover:
            changes.pop("recover", None)
        return Settings(**{**asdict(settings), **changes})

    def _recall(self, facts: dict[str, Any], measure: Callable[[], Figures]) -> Figures | None:
        status = RunDirectory.open(self.path).status()
        run = [FORMAT, str(status.created), status.facts.get("validation_bpb")]
        text = json.dumps([run, self.path.resolve().name, facts])
        key = hashlib.sha256(text.encode("utf-8")).hexdigest()[:20]
        place = cache_dir() / "compress-bench" / f"{key}.json"
        if place.is_file():
            found: Figures = json.loads(place.read_text(encoding="utf-8"))
            return found
        if time.monotonic() > self.until:
            return None
        found = measure()
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, found)
        return found

    def _time(self, settings: Settings) -> Figures:
        source = self.source
        source.outputs.clear()  # what one compression measures once is part of its time
        with tempfile.TemporaryDirectory() as place:
            wall, processor = time.perf_counter(), time.process_time()
            compress(source, settings, Path(place) / "model.cllm", Silent())
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
        return {"wall": wall, "processor": processor, "threads": torch.get_num_threads()}

    def _measure(self, settings: Settings) -> Figures:
        with tempfile.TemporaryDirectory() as place:
            made = compress(self.source, settings, Path(place) / "model.cllm", Silent())
        if made.bpb is None or made.base is None:
            raise UserError(f"{self.path} has no validation text: the bench needs some")
        layers = [layer for layer in made.layers if layer["name"].startswith("layers.")]
        found = {
            "bits": made.layer_bits,
            "bytes": made.bytes,
            "base": made.base,
            "bpb": made.bpb,
            "error": mean(layer["error"] for layer in layers),
        }
        if settings.recover:
            return found
        told = forecast(self.source, replace(settings, recover=0), Silent())
        errors = {layer["name"]: layer["error"] for layer in layers}
        pairs = [(layer.error, errors[layer.name]) for layer in told.layers]
        return found | {
            "predicted": told.rise,
            "low": told.low,
            "high": told.high,
            "errors": pairs,
        }

    def _measure_peer(self, rounded: Rounded) -> Figures:
        """Tables and norms in fp16, as ours; the layers' errors under what they see."""
        source, model = self.source, self.source.model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.half().float())
            for table in model.tables.values():
                table.after_step()
        errors = []
        for layer in calibrate(model, source.windows):
            weight = source.weights[f"{layer.name}.weight"].float()
            values = rounded.weights[f"{layer.name}.weight"]
            size = objective(weight, torch.zeros_like(weight), layer.seen).sum().clamp_min(1e-300)
            errors.append(float(objective(weight, values, layer.seen).sum() / size))
            with torch.no_grad():
                layer.linear.weight.copy_(values)
        bpb = score_on_validation(source, model, Silent(), "")
        return {
            "bits": rounded.bits,
            "bytes": None,
            "base": source.base,
            "bpb": bpb,
            "error": mean(errors),
            "note": rounded.note,
        }
