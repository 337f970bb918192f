"""The processors: how many we may use, what they can do, and whether someone else is using them."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

from cllm.core import cgroup

CPUINFO = Path("/proc/cpuinfo")
STAT = Path("/proc/stat")

# What a system calls it -> what we call it. x86 on Linux and macOS, then Arm on Linux and macOS.
_NAMES = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "amx_tile": "amx",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "advsimd": "neon",
    "sve": "sve",
    "sve2": "sve2",
    "bf16": "bf16",
    "feat_bf16": "bf16",
    "i8mm": "i8mm",
    "feat_i8mm": "i8mm",
    "feat_sme": "sme",
    "sme": "sme",
}


def cores() -> int:
    """Logical processors that this process may run on (its affinity)."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_threads() -> int:
    """Threads that can really run at once: the affinity, or a smaller cgroup quota rounded up."""
    quota = cgroup.cpu_quota()
    return cores() if quota is None else max(1, min(cores(), math.ceil(quota)))


def team_threads() -> int:
    """Threads of a team where no setting says how many: the usable ones, or fewer if ``OMP_NUM_THREADS``
    (its first number, where it lists one for each level) is less."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return (
        min(usable_threads(), int(asked)) if asked.isdecimal() and int(asked) else usable_threads()
    )


@cache
def cpu_model() -> str:
    """The processor's name as its maker gives it."""
    if sys.platform == "darwin":
        name = _sysctl("machdep.cpu.brand_string")
    elif sys.platform == "win32":
        name = platform.processor()
    else:
        name = _cpuinfo("model name") or _cpuinfo("Hardware")
    return name or f"{platform.machine()} processor"


@cache
def instruction_sets() -> tuple[str, ...]:
    """The vector and matrix instruction sets that matter to us: ``avx2``, ``avx512``, ``amx_bf16``…

    Asked of the system; where it does not tell (Windows), of torch, which knows only the widest vectors.
    """
    if sys.platform == "darwin":
        words = _macos_features()
    elif sys.platform == "linux":
        words = (_cpuinfo("flags") or _cpuinfo("Features")).lower().split()
    else:
        words = []
    if not words:
        words = _torch_features()
    return tuple(dict.fromkeys(_NAMES[word] for word in words if word in _NAMES))


def load_average() -> float | None:
    """Processes that ran or waited to run in the last minute, or ``None`` where nobody counts them."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def busy_seconds() -> float | None:
    """Seconds that all processors together have worked since the machine began, for whomever; ``None``
    where the system does not tell (all but Linux)."""
    try:
        fields = STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system = map(int, fields[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


def is_busy(threads: int | None = None) -> str | None:
    """Why the machine is too busy for a team of ``threads`` (default: usable), or ``None`` if it is not.

    A team waits for its slowest member at each operation, so one lost processor costs far more than its
    share. To be asked before training starts: afterwards the load is our own.
    """
    load, everyone = load_average(), os.cpu_count() or 1
    wanted = usable_threads() if threads is None else threads
    if load is None or load + wanted <= everyone + 0.5:
        return None
    return (
        f"other programs kept {load:.1f} of {everyone} processors busy in the last minute, and "
        f"{wanted} are wanted"
    )


def _cpuinfo(field: str) -> str:
    """The first value of ``field`` in /proc/cpuinfo, or an empty string."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _sysctl(name: str) -> str:
    try:
        answer = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return answer.stdout.strip()


def _macos_features() -> list[str]:
    if platform.machine() == "arm64":
        names = ("AdvSIMD", "FEAT_BF16", "FEAT_I8MM", "FEAT_SME")
        return [name.lower() for name in names if _sysctl(f"hw.optional.arm.{name}") == "1"] or [
            "advsimd"  # every Arm Mac has it; older systems do not list it
        ]
    return _sysctl("machdep.cpu.leaf7_features").lower().split()


def _torch_features() -> list[str]:
    import torch

    widest = torch.backends.cpu.get_cpu_capability()
    return {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512f"]}.get(widest, [])
