import os
import subprocess
import sys
from pathlib import Path

import pytest

from cllm.core import cgroup, cpu, machine, memory


def tree(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """A made-up /sys/fs/cgroup and /proc/self/cgroup."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "sys", root / "membership"


def test_cgroup_v2_takes_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    where = tree(
        tmp_path,
        {
            "membership": "0::/a/b\n",
            "sys/cpu.max": "max 100000",
            "sys/a/cpu.max": "150000 100000",
            "sys/a/b/cpu.max": "max 100000",
            "sys/a/memory.max": "max",
            "sys/a/b/memory.max": "1000000\n",
            "sys/a/b/memory.current": "600000",
            "sys/a/b/memory.stat": "anon 1\ninactive_file 100000\n",
        },
    )
    assert cgroup.cpu_quota(*where) == 1.5
    assert cgroup.memory_limit(*where) == 1_000_000
    assert cgroup.memory_used(*where) == 500_000


def test_cgroup_v1_with_shared_controllers_and_a_path_that_is_not_mounted(tmp_path: Path) -> None:
    where = tree(
        tmp_path,
        {
            "membership": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
            "sys/cpu,cpuacct/cpu.cfs_quota_us": "50000",
            "sys/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/memory/memory.limit_in_bytes": "4096",
            "sys/memory/memory.usage_in_bytes": "3000",
        },
    )
    assert cgroup.cpu_quota(*where) == 0.5
    assert cgroup.memory_limit(*where) == 4096
    assert cgroup.memory_used(*where) == 3000


def test_no_cgroup_no_limit(tmp_path: Path) -> None:
    where = tree(tmp_path, {"membership": "1:cpu:/\n", "sys/cpu/cpu.cfs_quota_us": "-1"})
    assert cgroup.cpu_quota(*where) is None
    assert cgroup.memory_limit(*where) is None
    assert cgroup.cpu_quota(tmp_path / "none", tmp_path / "none") is None


@pytest.mark.parametrize(
    ("affinity", "quota", "threads"), [(8, None, 8), (8, 2.5, 3), (2, 4.0, 2), (4, 0.2, 1)]
)
def test_usable_threads(
    monkeypatch: pytest.MonkeyPatch, affinity: int, quota: float | None, threads: int
) -> None:
    monkeypatch.setattr(cpu, "cores", lambda: affinity)
    monkeypatch.setattr(cgroup, "cpu_quota", lambda: quota)
    assert cpu.usable_threads() == threads


@pytest.mark.parametrize(
    ("asked", "threads"),
    [("", 4), ("1", 1), ("3,2", 3), ("16", 4), ("0", 4), ("many", 4), ("-1", 4)],
)
def test_a_team_is_no_larger_than_openmp_is_told(
    monkeypatch: pytest.MonkeyPatch, asked: str, threads: int
) -> None:
    monkeypatch.setattr(cpu, "usable_threads", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert cpu.team_threads() == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cpu.team_threads() == 4


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_cores_follow_the_affinity() -> None:
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from cllm.core.cpu import cores; print(cores())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "1\n"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (
            "model name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n",
            ("avx2", "avx512", "avx512_bf16", "amx_bf16", "amx"),
        ),
        ("Features\t: fp asimd i8mm bf16 sve\n", ("neon", "i8mm", "bf16", "sve")),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc/cpuinfo")
def test_instruction_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu.instruction_sets.__wrapped__() == names


def test_torch_is_asked_where_the_system_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(cpu.sys, "platform", "freebsd")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert cpu.instruction_sets.__wrapped__() == ("avx2", "avx512")


@pytest.mark.parametrize(
    ("load", "processors", "threads", "busy"),
    [
        (0.1, 2, 2, False),
        (0.9, 2, 2, True),
        (0.9, 2, 1, False),
        (6.0, 8, 2, False),
        (None, 2, 2, False),
    ],
)
def test_is_busy(
    monkeypatch: pytest.MonkeyPatch, load: float | None, processors: int, threads: int, busy: bool
) -> None:
    monkeypatch.setattr(cpu, "load_average", lambda: load)
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    reason = cpu.is_busy(threads)
    assert (reason is not None) == busy
    if reason is not None:
        assert f"{load}" in reason


def test_memory_is_plausible() -> None:
    total, available = memory.total_memory(), memory.available_memory()
    assert total is not None
    assert available is not None
    assert 0 < available <= total
    assert 2**20 < memory.peak_rss() < total


def test_peak_rss_sees_an_allocation() -> None:
    code = (
        "from cllm.core.memory import peak_rss; before = peak_rss();"
        "block = bytearray(b'x') * 200_000_000; print(peak_rss() - before)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert 190e6 < int(answer.stdout) < 260e6


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            500000.
Pages inactive:                            2000.
Pages speculative:                          300.
Pages throttled:                              0.
Pages wired down:                        100000.
Pages purgeable:                             40.
"Translation faults":                 123456789.
"""


def test_what_macos_says_of_its_pages() -> None:
    assert memory._macos_available(VM_STAT) == 12_340 * 16_384
    assert memory._macos_available(VM_STAT.replace("Pages purgeable", "Pages")) is None
    assert memory._macos_available("no such table") is None
    assert memory._macos_available(None) is None


def test_cgroup_limit_bounds_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "memory_limit", lambda: 5_000_000)
    monkeypatch.setattr(cgroup, "memory_used", lambda: 2_000_000)
    assert memory.memory_limit() == 5_000_000
    assert memory.available_memory() == 3_000_000


def test_the_tests_have_a_cache_directory_of_their_own(cache: Path) -> None:
    assert machine.cache_dir() == cache


@pytest.mark.skipif(sys.platform != "linux", reason="the other systems have their own places")
def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "mine"))
    assert machine.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("CLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.cache_dir() == tmp_path / "cllm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert machine.cache_dir() == Path.home() / ".cache" / "cllm"


def test_compiler_must_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(machine, "cpp_compiler", machine.cpp_compiler.__wrapped__)
    assert machine.cpp_compiler() is None
    assert "no C++ compiler" in (machine.cannot_compile() or "")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert machine.cpp_compiler() is None


def test_describe_names_every_fact() -> None:
    rows = dict(machine.describe())
    here = machine.machine()
    assert str(here.cores) in rows["cores"]
    assert rows["processor"] == here.cpu
    assert all(name in rows["instruction sets"] for name in here.instruction_sets)
    assert machine.torch_version() in rows["torch"]
    assert rows["cache"] == str(machine.cache_dir())
    assert set(rows) >= {"system", "python", "cpu quota", "memory", "load", "compiler"}


def test_facts_need_no_torch() -> None:
    code = (
        "import sys; from cllm.core import machine, measurements; machine.machine();"
        "measurements.recall('x'); print('torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "False\n"
