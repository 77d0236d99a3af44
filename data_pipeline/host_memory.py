"""Main memory that this process may still use: the machine's, or what its container allows."""

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Version 2, then version 1: (limit, use, the part of the use that is given back on demand).
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(*, cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Bytes: the least of what the machine has left and what each control group around this process
    (a container, a job of SLURM) has left."""
    left = [psutil.virtual_memory().available]
    for folder in control_groups("memory", cgroups, membership):
        left += [left_in_group for names in FILES for left_in_group in _left(folder, names)]
    return max(min(left), 0)


def control_groups(controller: str, cgroups: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process's groups of a controller, and of those around them."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root = cgroups
        elif controller in controllers.split(","):
            root = cgroups / controller
        else:
            continue
        folder = root / path.strip("/")
        while folder != root:
            yield folder
            folder = folder.parent
        yield root


def _left(folder: Path, names: tuple[str, str, str]) -> Iterator[int]:
    """What a group has left; nothing where it has no limit or cannot be read."""
    limit_file, use_file, given_back = names
    try:
        limit = (folder / limit_file).read_text().strip()
        use = int((folder / use_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        if limit != "max":
            yield int(limit) - use + int(stat.get(given_back, 0))
    except (OSError, ValueError):
        return
