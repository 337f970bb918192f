"""Checkpoints that several processes write together: torch's distributed checkpoint (DCP) in safetensors.

``sharded/shard-00001-….safetensors``, a file for each process, which holds its share of each tensor and
says where it belongs. Any number of processes, one among them, reads what any number wrote. DCP's own
format begins with a pickle, which would run a stranger's code; its safetensors store does not.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cllm.core.atomic import clear_errors

NAME = "sharded"
WEIGHTS = "weights"
"""What the names of weights begin with; those of the optimizer's begin with the moment's name."""


def write_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's shares into ``directory``; all processes of the group at once.

    Raises ``UserError``, in all of them, where one cannot write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with _quietly():
            writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
            dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            with clear_errors(directory):
                raise cause from error


def read_shards(directory: Path, only: str | None = None) -> dict[str, dict[str, Tensor]]:
    """Whole tensors on the CPU by kind (``weights``, or a moment) and parameter name, in one process.

    ``only``: this kind alone.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with _quietly():
        found = dcp.HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
        wanted = {
            key: torch.empty(facts.size, dtype=facts.properties.dtype)
            for key, facts in found.items()
            if isinstance(facts, TensorStorageMetadata)
            if only is None or key.startswith(f"{only}/")
        }
        reader = dcp.HuggingFaceStorageReader(str(directory))
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    kinds: dict[str, dict[str, Tensor]] = {}
    for key, tensor in wanted.items():
        kind, _, name = key.partition("/")
        kinds.setdefault(kind, {})[name] = tensor
    return kinds


def files_of(directory: Path) -> list[str]:
    """The files below ``directory``, as a manifest names them."""
    return sorted(f"{directory.name}/{path.name}" for path in directory.iterdir())


@contextmanager
def _quietly() -> Iterator[None]:
    """DCP warns of what is meant (one process, plain tensors)."""
    log = logging.getLogger("torch.distributed.checkpoint")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
