"""``torchscript``, ``torch-export`` and ``aoti``: reloaded in a process that does not import cllm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cllm.core.errors import UserError
from cllm.core.machine import cannot_compile
from cllm.export.check import CheckFailedError, check
from cllm.export.formats import FORMATS, format_of
from cllm.export.fresh import PROGRAM
from cllm.export.marks import obstacle
from cllm.export.source import Source

SourceOf = Callable[..., Source]
Exported = Callable[..., tuple[Path, Any]]
QUICK = "batchnorm gelu untied"
TRACED = ("torchscript", "torch-export")


def holds(source: Source, exported: Exported, to: str) -> None:
    """Export and check against the model itself."""
    path, _ = exported(source, to)
    assert format_of(path).name == to
    with closing(FORMATS[to].load().open_runtime(path)) as runtime:
        assert "without cllm" in runtime.name
        assert check(runtime, source.model, source, shapes=12).difference <= 1e-4
        # More tokens than there are positions end in an error, not in numbers.
        ids = np.zeros((1, source.config.context + 1), np.int64)
        with pytest.raises(UserError, match="gives no logits for ids of shape"):
            runtime.logits(ids)


@pytest.mark.parametrize("to", TRACED)
def test_files_give_the_models_logits_without_cllm(
    to: str, source_of: SourceOf, exported: Exported
) -> None:
    holds(source_of(QUICK, n_kv_heads=2), exported, to)


@pytest.mark.slow
@pytest.mark.parametrize("to", [*TRACED, "aoti"])
def test_each_kind_of_model_is_held(
    kind: str, to: str, source_of: SourceOf, exported: Exported
) -> None:
    if to == "aoti" and cannot_compile():
        pytest.skip(str(cannot_compile()))
    holds(source_of(kind, n_layers=1), exported, to)


def test_another_models_file_fails_the_check(source_of: SourceOf, exported: Exported) -> None:
    path, _ = exported(source_of(), "torchscript")
    other = source_of(rope_theta=400.0)
    with (
        closing(FORMATS["torchscript"].load().open_runtime(path)) as runtime,
        pytest.raises(CheckFailedError, match="logits differ"),
    ):
        check(runtime, other.model, other)


@pytest.mark.parametrize("to", [*TRACED, pytest.param("aoti", marks=pytest.mark.slow)])
def test_a_truncated_file_is_one_line(to: str, source_of: SourceOf, exported: Exported) -> None:
    if to == "aoti" and cannot_compile():
        pytest.skip(str(cannot_compile()))
    path, _ = exported(source_of(n_layers=1), to)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="is broken or cut short"):
        format_of(path)
    with pytest.raises(UserError, match="cannot be loaded without cllm") as caught:
        FORMATS[to].load().open_runtime(path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_compiled_package_looks_at_lengths(source_of: SourceOf, exported: Exported) -> None:
    if cannot_compile():
        pytest.skip(str(cannot_compile()))
    source = source_of("learned", n_layers=1)
    path, _ = exported(source, "aoti")
    assert obstacle(path, FORMATS["aoti"]) == "", "it bears our mark"
    context, rng = source.config.context, np.random.default_rng(3)
    for batch in (1, 2, 7):
        for length in (1, 2, context - 1, context, context + 1, 2 * context, 40 * context):
            ids = rng.integers(0, source.tokenizer.vocab_size, (batch, length))
            with closing(FORMATS["aoti"].load().open_runtime(path)) as runtime:  # a process each
                if length > context:
                    with pytest.raises(UserError, match="gives no logits for ids of shape"):
                        runtime.logits(ids)
                    continue
                with torch.no_grad():
                    wanted = source.model(torch.from_numpy(ids)).numpy()
                np.testing.assert_allclose(runtime.logits(ids), wanted, atol=1e-4)


def test_the_outside_program_does_not_import_cllm() -> None:
    text = PROGRAM.read_text(encoding="utf-8")
    code = f"import runpy, sys; runpy.run_path({str(PROGRAM)!r}); print('cllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert "import cllm" not in text.replace("must\nnot import cllm", "")
