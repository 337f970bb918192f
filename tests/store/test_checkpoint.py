import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.core import atomic
from cllm.core.errors import UserError
from cllm.store import checkpoint, manifest, steps
from cllm.store.manifest import DamagedCheckpointError
from cllm.store.run import RunDirectory


def save(run: RunDirectory, step: int, *, best: bool = False, keep_last: int = 10) -> Path:
    return checkpoint.save(
        run.path,
        step,
        weights={"w": torch.full((3, 4), float(step)), "b": torch.arange(4, dtype=torch.bfloat16)},
        optimizer={
            "m": {"w": torch.full((3, 4), -float(step))},
            "step": step,
            "betas": (0.9, 0.95),
        },
        state={"epoch": 2, "loss": 0.5},
        keep_last=keep_last,
        best=best,
    )


def test_what_is_saved_comes_back_bit_for_bit(run: RunDirectory) -> None:
    values = torch.tensor([1.0, -0.0, float("nan"), float("inf"), 1e-45])
    arena = torch.randn(100)
    path = checkpoint.save(
        run.path,
        1000,
        weights={"view": arena[10:30].view(4, 5), "other": arena[30:40], "half": values.bfloat16()},
        optimizer={
            "m": arena[50:60],
            "values": values,
            "n": 3,
            "nested": [1, (0.5, None, "x", True)],
        },
        state={"seed": 2**62, "best": float("inf"), "text": "ü\ud800", "10": 1, "2": [1.5]},
        keep_last=1,
        best=False,
    )
    assert path == run.path / "checkpoints" / "step-00001000"
    loaded = checkpoint.load(run.path)
    assert (loaded.step, loaded.path) == (1000, path)
    assert torch.equal(loaded.weights["view"], arena[10:30].view(4, 5))
    assert torch.equal(
        loaded.weights["half"].view(torch.int16), values.bfloat16().view(torch.int16)
    )
    assert torch.equal(loaded.optimizer["m"], arena[50:60])
    assert torch.equal(loaded.optimizer["values"].view(torch.int32), values.view(torch.int32))
    assert loaded.optimizer["nested"] == [1, (0.5, None, "x", True)]
    assert loaded.state == {
        "seed": 2**62,
        "best": float("inf"),
        "text": "ü\ud800",
        "10": 1,
        "2": [1.5],
    }


def test_a_view_does_not_drag_its_arena_to_the_disk(run: RunDirectory) -> None:
    arena = torch.zeros(1_000_000)
    path = checkpoint.save(
        run.path,
        1,
        weights={"w": arena[:4]},
        optimizer={"m": arena[4:8]},
        state={},
        keep_last=1,
        best=False,
    )
    assert sum(file.stat().st_size for file in path.iterdir()) < 10_000


def test_saving_twice_gives_the_same_bytes(run: RunDirectory) -> None:
    files = [{f.name: f.read_bytes() for f in save(run, 1).iterdir()} for _ in range(2)]
    assert files[0] == files[1]
    assert set(files[0]) == {"model.safetensors", "optimizer.pt", "state.json"}


def test_what_could_not_be_loaded_is_not_saved(run: RunDirectory) -> None:
    shared = torch.zeros(4)
    cases: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        ({"a": shared, "b": shared[2:]}, {}, {}),
        ({"a": shared}, {"object": Path()}, {}),
    ]
    for weights, optimizer, state in cases:
        with pytest.raises(AssertionError):
            checkpoint.save(
                run.path,
                1,
                weights=weights,
                optimizer=optimizer,
                state=state,
                keep_last=1,
                best=False,
            )
    assert list(run.checkpoints.iterdir()) == []


def test_which(run: RunDirectory) -> None:
    for step in (10, 20, 30):
        save(run, step, best=step == 20)
    assert checkpoint.load(run.path).step == 30
    assert checkpoint.load(run.path, "best").step == 20
    assert checkpoint.load(run.path, 10).step == 10
    assert checkpoint.load(run.checkpoints / "step-00000010").step == 10
    assert checkpoint.load(run.checkpoints / "best").step == 20
    assert checkpoint.load(run.checkpoints / "last").step == 30
    assert checkpoint.load_weights(run.path)["w"][0, 0] == 20
    assert checkpoint.load(run.path, with_optimizer=False).optimizer == {}
    with pytest.raises(UserError, match="no checkpoint of step 11; it has: 10, 20, 30"):
        checkpoint.load(run.path, 11)


def test_nothing_to_load(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run"):
        checkpoint.load(tmp_path / "nowhere")
    run.checkpoints.mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        checkpoint.load(run.path)
    save(run, 1)
    with pytest.raises(UserError, match="no best checkpoint yet"):
        checkpoint.load(run.path, "best")
    assert checkpoint.load_weights(run.path)["w"][0, 0] == 1


def test_pruning_keeps_the_newest_and_the_best(run: RunDirectory) -> None:
    for step in range(1, 8):
        save(run, step, best=step == 2, keep_last=2)
        assert steps.best_step(run.path) == (2 if step >= 2 else None)
    assert run.steps() == [2, 6, 7]
    assert atomic.pointed_at(run.checkpoints / "best") == "step-00000002"
    assert atomic.pointed_at(run.checkpoints / "last") == "step-00000007"
    save(run, 8, best=True, keep_last=2)
    assert run.steps() == [7, 8]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "best",
        "last",
        "step-00000007",
        "step-00000008",
    ]


def test_going_on_from_an_earlier_checkpoint_drops_the_later_ones(run: RunDirectory) -> None:
    for step in (10, 20, 30):
        save(run, step, best=step != 20)
    assert [path.name for path in steps.discard_after(run.path, 20)] == ["step-00000030"]
    assert run.steps() == [10, 20]
    assert atomic.pointed_at(run.checkpoints / "last") == "step-00000020"
    assert atomic.pointed_at(run.checkpoints / "best") == "step-00000010"


def test_a_kill_between_checkpoint_and_links_is_mended(run: RunDirectory) -> None:
    save(run, 10, best=True)
    save(run, 20, best=True)
    for name in ("best", "last"):  # as after a kill: they still point at the older one
        atomic.point(run.checkpoints / name, "step-00000010")
    assert checkpoint.load(run.path, "best").step == 20
    with run.training():
        assert atomic.pointed_at(run.checkpoints / "best") == "step-00000020"
        assert atomic.pointed_at(run.checkpoints / "last") == "step-00000020"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "grow", "delete"])
def test_damage_is_refused_and_the_one_before_offered(
    run: RunDirectory, name: str, damage: str
) -> None:
    save(run, 10)
    whole = save(run, 20)
    broken = save(run, 30)
    harm(broken / name, damage)
    with pytest.raises(DamagedCheckpointError) as caught:
        checkpoint.load(run.path)
    text = str(caught.value)
    assert text.startswith(str(broken / name))
    assert text.endswith(f"--resume {whole}")
    assert "\n" not in text
    assert checkpoint.load(whole).step == 20  # as advised

    harm(whole / "model.safetensors", "flip")
    with pytest.raises(DamagedCheckpointError, match=r"--resume .*step-00000010$"):
        checkpoint.load(run.path)


def harm(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
        return
    if how == "truncate":
        data = data[: len(data) // 2]
    elif how == "grow":
        data += b" x"
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_only_checkpoint_damaged(run: RunDirectory) -> None:
    harm(save(run, 10) / "optimizer.pt", "flip")
    with pytest.raises(DamagedCheckpointError, match="no whole checkpoint"):
        checkpoint.load(run.path)
    assert checkpoint.load(run.path, with_optimizer=False).step == 10  # its weights are whole


def test_a_changed_value_in_the_state_is_noticed(run: RunDirectory) -> None:
    path = save(run, 10) / "state.json"
    path.write_text(path.read_text().replace('"epoch": 2', '"epoch": 3'))
    with pytest.raises(DamagedCheckpointError, match="was altered"):
        checkpoint.load(run.path)


def test_no_code_is_run_by_loading(run: RunDirectory, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    path = save(run, 10)
    torch.save({"m": Trap()}, path / "optimizer.pt")
    old = manifest.read_manifest(path)
    files = old.files | {"optimizer.pt": manifest.file_facts(path / "optimizer.pt")}
    manifest.write_manifest(path, manifest.Manifest(step=10, best=False, files=files))
    with pytest.raises(Exception, match="weights_only"):
        checkpoint.load(run.path)
    assert not (tmp_path / "trapped").exists()


def test_formats(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(run, 10)
    monkeypatch.setattr(manifest, "FORMAT", 2)
    monkeypatch.setitem(
        manifest.MIGRATIONS, 1, lambda body: body | {"state": {"moved": body["state"]["epoch"]}}
    )
    assert checkpoint.load(run.path).state == {"moved": 2}
    save(run, 20)
    monkeypatch.setattr(manifest, "FORMAT", 1)
    with pytest.raises(UserError, match="update cllm"):
        checkpoint.load(run.path)
    assert json.loads((path / "state.json").read_text())["format"] == 1


@pytest.mark.parametrize("limit", [300, 3_000, 60_000])
def test_a_full_disk_leaves_the_checkpoint_before(run: RunDirectory, limit: int) -> None:
    """The limit strikes in safetensors, in torch.save and in between."""
    resource = pytest.importorskip("resource")
    save(run, 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match="ulimit -f") as caught:
            checkpoint.save(
                run.path,
                20,
                weights={"w": torch.zeros(100 if limit == 3_000 else 20_000)},
                optimizer={"m": torch.zeros(20_000)},
                state={},
                keep_last=1,
                best=False,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["last", "step-00000010"]
    assert checkpoint.load(run.path).step == 10


def test_no_space_left_is_told(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "flush_to_disk", full)
    with pytest.raises(UserError, match="the disk is full"):
        save(run, 10)
    assert run.steps() == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_others_may_read_the_weights_as_the_umask_says(run: RunDirectory) -> None:
    path = save(run, 10)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    assert len(modes) == 1
