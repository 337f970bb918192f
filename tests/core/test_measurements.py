from pathlib import Path

import pytest

from cllm.core import measurements
from cllm.core.measurements import afresh, recall, remember


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_remembers(kept: Path) -> None:
    assert recall("attention") is None
    assert remember("attention", {"sdpa": 1.5})
    assert remember("matmul", [1, 2])
    assert recall("attention") == {"sdpa": 1.5}
    assert recall("matmul") == [1, 2]
    assert [path.suffix for path in (kept / "measurements").iterdir()] == [".json"]


def test_another_thread_count_or_torch_is_another_measurement(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember("attention", 1, threads=1)
    assert recall("attention", threads=2) is None
    monkeypatch.setattr(measurements, "torch_version", lambda: "99")
    assert recall("attention", threads=1) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"values": 3}', '{"machine": {}}'])
def test_a_damaged_file_counts_as_none(kept: Path, damage: str) -> None:
    remember("attention", 1)
    (file,) = (kept / "measurements").iterdir()
    file.write_text(damage)
    assert recall("attention") is None
    assert remember("attention", 2)
    assert recall("attention") == 2


def test_an_unwritable_cache_is_told(kept: Path) -> None:
    kept.write_text("a file stands in the way")
    assert remember("attention", 1) is False
    assert recall("attention") == 1  # in this process
    measurements._meanwhile.clear()
    assert recall("attention") is None


def test_what_is_measured_afresh_stays_apart(kept: Path) -> None:
    remember("attention", 1)
    with afresh():
        assert recall("attention") is None
        assert remember("attention", 2)
        assert recall("attention") == 2
        with afresh():
            assert recall("attention") is None
        assert recall("attention") == 2
    assert recall("attention") == 1


def test_what_is_not_for_good_stays_in_this_process(kept: Path) -> None:
    assert remember("attention", 1, for_good=False)
    assert recall("attention") == 1
    assert recall("attention", threads=99) is None
    assert not kept.exists()
    with afresh():
        assert recall("attention") is None
    remember("attention", 2)
    remember("attention", 3, for_good=False)
    assert recall("attention") == 3  # the last one
    measurements._meanwhile.clear()  # another process
    assert recall("attention") == 2
