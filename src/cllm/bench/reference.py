"""Reference runs: models that benches measure something on, trained once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import Any

from cllm.core.config import Config
from cllm.core.machine import cache_dir
from cllm.core.settings import flat_toml, flatten
from cllm.store.run import RunDirectory, is_run
from cllm.text.sources import expand

FORMAT = 1
"""Raised when training changes so that kept runs no longer stand for it."""

ADDED = (
    "model.embedding.pieces_from",
    "train.lazy_rows",
    "train.loss",
    "train.sampled.candidates",
    "train.sampled.sampler",
    "train.sampled.neighbours",
    "train.sampled.share",
    "train.similarity.weight",
    "train.similarity.until",
    "train.similarity.pairs",
    "train.similarity.neighbours",
)
"""Settings that came since and whose defaults give the very same bits: at these they are not in the key."""

DONE = ("finished", "stopped early")


def reference_run(config: Config) -> RunDirectory:
    """The run of ``config``: the kept one, or one trained now (silently; it takes as long as it takes).

    The key is the hash of the whole configuration and of the content of its text, so that a changed
    file trains anew. A run that was interrupted goes on from its last checkpoint. Raises ``UserError``
    as training does, and while another process trains the same run.
    """
    from cllm.training.progress import Silent
    from cllm.training.session import resume, start

    path = cache_dir() / "reference-runs" / reference_key(config)
    if is_run(path):
        run = RunDirectory.open(path)
        if run.status().state in DONE and run.report.is_file():
            return run
        if run.steps():
            return resume(path, (), Silent()).run
        if run.status().state != "running":  # killed before its first checkpoint
            shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return start(config, Silent(), out=path).run


def is_kept(config: Config) -> bool:
    """Whether ``reference_run`` has nothing to train."""
    path = cache_dir() / "reference-runs" / reference_key(config)
    return is_run(path) and RunDirectory.open(path).status().state in DONE


def reference_key(config: Config) -> str:
    """What a reference run is kept under: 16 hex digits of configuration and text."""
    sources = expand(config.data.paths)
    prints = [[f.size, f.sha256] for f in (source.fingerprint() for source in sources)]
    # Where the text lies decides nothing; what it says does.
    where = {"data": config.data.model_copy(update={"paths": ()})}
    facts = json.dumps([FORMAT, flat_toml(told_settings(config.model_copy(update=where))), prints])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def told_settings(config: Config) -> dict[str, Any]:
    """The settings that the key is of: all but those ``ADDED`` that are at their defaults."""
    values, defaults = flatten(config.model_dump()), flatten(Config().model_dump())
    return {
        key: value for key, value in values.items() if not (key in ADDED and value == defaults[key])
    }
