"""What this machine's memory still has room for: the system's own figure, and the limits of this process's control groups. Must not import torch."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def host_free() -> int:
    """Bytes that this process can still take."""
    return min([psutil.virtual_memory().available, *cgroup_rooms(Path("/proc/self/cgroup"), CGROUPS)])


def cgroup_rooms(membership: Path, root: Path) -> list[int]:
    """Bytes left below every memory limit of the groups that this process is in; empty without limits."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    rooms: list[int] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            rooms += _rooms(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            rooms += _rooms(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return rooms


def _rooms(root: Path, path: str, limit_name: str, usage_name: str, cache_name: str) -> list[int]:
    """A limit of any ancestor counts; file pages that nobody uses are as good as free."""
    rooms = []
    group = Path(path.strip("/"))
    for folder in (root / group, *(root / parent for parent in group.parents)):
        try:
            limit = (folder / limit_name).read_text().strip()
            if limit == "max" or int(limit) >= 1 << 60:
                continue
            usage = int((folder / usage_name).read_text())
            cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines()).get(cache_name, "0")
            rooms.append(max(0, int(limit) - usage + int(cache)))
        except (OSError, ValueError):
            continue
    return list(dict.fromkeys(rooms))
