"""Reference runs: models that benches measure something on, trained once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence

from cllm.core.config import Config
from cllm.core.machine import cache_dir
from cllm.store.run import RunDirectory, is_run
from cllm.text.sources import expand

FORMAT = 2
"""Raised when training, or the default of a setting, changes so that kept runs no longer stand for it."""

QUICK = {
    "model.preset": "nano",
    "tokenizer.vocab_size": 400,
    "train.steps": 8,
    "train.compile": "off",
    "train.dtype": "fp32",
    "train.attention": "matmul",
    "train.batch_size": 4,
    "log.sample_tokens": 0,
}
"""Settings with which a quick bench trains next to nothing."""

DONE = ("finished", "stopped early")


def reference_run(config: Config) -> RunDirectory:
    """The run of ``config``: the kept one, or one trained now (silently; it takes as long as it takes).

    The key is the hash of what the configuration changes of the defaults and of the content of its
    text: a changed file trains anew, a setting that is new to the house does not. A run that was
    interrupted goes on from its last checkpoint. Raises ``UserError`` as training does, and while
    another process trains the same run.
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


def is_kept(key: str) -> bool:
    """Whether ``reference_run`` has nothing to train for the configuration of ``key``."""
    path = cache_dir() / "reference-runs" / key
    return is_run(path) and RunDirectory.open(path).status().state in DONE


Prints = list[tuple[int, str]]


def text_prints(paths: Sequence[str]) -> Prints:
    """Size and hash of what the text of ``paths`` says; where it lies decides nothing."""
    found = (source.fingerprint() for source in expand(paths))
    return [(one.size, one.sha256) for one in found]


def reference_key(config: Config, prints: Prints | None = None) -> str:
    """What a reference run is kept under: 16 hex digits of configuration and text.

    ``prints``: of its text, where they are known (reading the built-in corpus takes a second).
    """
    if prints is None:
        prints = text_prints(config.data.paths)
    where = {"data": config.data.model_copy(update={"paths": ()})}
    changed = config.model_copy(update=where).model_dump(mode="json", exclude_defaults=True)
    facts = json.dumps([FORMAT, changed, prints], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
