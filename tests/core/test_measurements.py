from pathlib import Path

import pytest

from cllm.core import measurements
from cllm.core.measurements import recall, remember


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
    assert recall("attention") is None
