"""A file of a run that is cut short is refused in one line, or changes nothing of what the run gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cllm
from cllm.core.errors import UserError
from cllm.core.settings import load_whole, to_toml
from cllm.store import checkpoint, steps
from cllm.store.arrays import load_arrays
from cllm.store.manifest import DamagedCheckpointError


@contextmanager
def cut(path: Path, to: int) -> Iterator[None]:
    """The file with its first ``to`` bytes alone, for a while."""
    body = path.read_bytes()
    path.write_bytes(body[:to])
    try:
        yield
    finally:
        path.write_bytes(body)


@pytest.fixture(scope="module")
def copy(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with several checkpoints that may be harmed."""
    place = tmp_path_factory.mktemp("cut") / "run"
    shutil.copytree(trained, place, symlinks=True)
    torch.set_num_threads(1)
    return place


@pytest.fixture(scope="module")
def whole(copy: Path) -> str:
    """What the run writes."""
    return written(copy)


def written(run: Path) -> str:
    """The likeliest text."""
    return cllm.load(run).generate("The", max_tokens=8, temperature=0)


def told(call: Callable[[], str]) -> str:
    """What a call returns, or its one line of refusal."""
    try:
        return call()
    except UserError as error:
        return f"refused: {error}"


def places(size: int) -> st.SearchStrategy[int]:
    """Lengths that a file of ``size`` may be cut to; a few bytes less are likely."""
    return st.one_of(st.integers(1, min(size, 6)).map(lambda n: size - n), st.integers(0, size - 1))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_file_of_a_run_cut_anywhere_is_refused_or_not_needed(
    data: st.DataObject, copy: Path, whole: str
) -> None:
    files = sorted(p for p in copy.rglob("*") if p.is_file() and p.stat().st_size)
    file = data.draw(st.sampled_from([p for p in files if not p.parent.is_symlink()]))
    with cut(file, data.draw(places(file.stat().st_size))):
        found = told(lambda: written(copy))
    assert found == whole or (str(file) in found and "\n" not in found)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_file_of_a_checkpoint_cut_anywhere_is_refused(data: st.DataObject, copy: Path) -> None:
    directory = checkpoint.find(copy, "last")
    file = data.draw(st.sampled_from(sorted(directory.iterdir())))
    with (
        cut(file, data.draw(places(file.stat().st_size))),
        pytest.raises(DamagedCheckpointError) as caught,
    ):
        checkpoint.load(directory)
    assert caught.value.file == file
    assert "\n" not in str(caught.value)
    assert checkpoint.load(directory).step == steps.step_of(directory)


def test_a_damaged_checkpoint_that_may_be_the_best_is_not_passed_over(copy: Path) -> None:
    best, known = steps.best_step(copy), steps.steps(copy)
    assert best is not None
    newest = steps.step_directory(copy, known[-1]) / "state.json"
    with cut(newest, newest.stat().st_size - 2):
        for load in (cllm.load(copy).weights, lambda: load_arrays(copy), lambda: written(copy)):
            with pytest.raises(DamagedCheckpointError, match=r"state\.json is truncated"):
                load()
        for step in known[:-1]:  # as advised: one that is named is taken
            assert cllm.load(steps.step_directory(copy, step)).weights()
        assert steps.best_step(copy) in (None, *known[:-1])  # what is cleaned up goes on


def test_the_configuration_of_a_run_is_whole_or_refused(
    copy: Path, cllm: Callable[..., object]
) -> None:
    file = copy / "run.toml"
    body = file.read_bytes()
    ends = [place + 1 for place, byte in enumerate(body) if byte == 10]
    config, refused = to_toml(load_whole(file)), 0
    for end in {*ends[:-1], *(end - 1 for end in ends)}:
        with cut(file, end):
            found = told(lambda: to_toml(load_whole(file)))
        if found.startswith("refused: "):
            refused += 1
            assert "is cut short" in found or "not valid TOML" in found
        else:  # of the last section, how a run is logged, some lines may be missing
            assert found.partition("[log]")[0] == config.partition("[log]")[0]
    assert refused > 0.8 * len(ends)
    with cut(file, body.index(b"\n[log]")):
        result = cllm("generate", copy)
        assert result.code == 1  # type: ignore[attr-defined]
        assert "run.toml is cut short (it has no [log])" in result.err  # type: ignore[attr-defined]
