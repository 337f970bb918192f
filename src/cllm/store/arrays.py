"""A checkpoint's weights as numpy arrays, for what needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cllm.core.atomic import clear_errors
from cllm.core.errors import UserError
from cllm.store import steps
from cllm.store.manifest import check_files, read_manifest

WEIGHTS = "model.safetensors"


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Weights by parameter name of the checkpoint at ``path``, or of the run's best one, else its last.

    The file is checked against its SHA-256. Raises ``UserError`` where there is none, where it is damaged,
    and where its weights lie in shards or in a type that numpy does not have (bfloat16).
    """
    run, step = steps.locate(path)
    if step is None:
        step = steps.chosen_step(run)
    directory = steps.step_directory(run, step)
    manifest = read_manifest(directory)
    if WEIGHTS not in manifest.files:
        raise UserError(f"the weights of {directory} are not in one file")
    check_files(directory, manifest, [WEIGHTS])
    with clear_errors(directory, "read"):
        try:
            found: dict[str, np.ndarray] = load_file(directory / WEIGHTS)
        except (SafetensorError, TypeError, KeyError) as error:
            raise UserError(f"numpy cannot read the weights of {directory}: {error}") from error
    return found
