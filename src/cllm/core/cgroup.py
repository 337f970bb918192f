"""Limits that Linux control groups (containers, batch systems) put on processors and memory.

Both versions: one tree for everything (v2), or a tree for each controller (v1). A limit anywhere on the
way from our group to the root binds, so the tightest counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Processors' worth of time a second that we may use, or ``None`` without a limit."""
    quotas = []
    for group in _groups("", root, membership):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    for group in _groups("cpu", root, membership):
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # -1 is no limit
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes we may use, or ``None`` without a limit. (v1 writes a huge number for none.)"""
    limits = [_read(group / "memory.max") for group in _groups("", root, membership)]
    limits += [
        _read(group / "memory.limit_in_bytes") for group in _groups("memory", root, membership)
    ]
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def memory_used(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes our group uses that cannot be reclaimed at once: page cache of files is not counted."""
    for controller, file, cache in (
        ("", "memory.current", "inactive_file"),
        ("memory", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in _groups(controller, root, membership):
            used = _read(group / file)
            if used.isdigit():
                lines = (line.split() for line in _read(group / "memory.stat").splitlines())
                stat = {words[0]: int(words[1]) for words in lines if len(words) == 2}
                return max(0, int(used) - stat.get(cache, 0))
    return None


def _groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Our group's directory and those above it; ``controller`` is empty for v2."""
    for line in _read(membership).splitlines():
        number, names, path = line.split(":", 2)
        if controller not in names.split(",") or (not controller and number != "0"):
            continue
        # Mixed systems have v2's tree at `unified`; v1 controllers may share a directory.
        mounts = [root, root / "unified"] if not controller else [root / controller, root / names]
        for mount in dict.fromkeys(mounts):
            # Without a namespace of its own a container sees a path that its mount does not have.
            group = mount / path.lstrip("/")
            for directory in (group, *group.parents):
                if directory.is_dir():
                    yield directory
                if directory == mount:
                    break


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
