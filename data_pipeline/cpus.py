"""How many CPUs this process may use: those it is bound to, and what its container allows."""

import math
import os
from pathlib import Path

from data_pipeline.host_memory import CGROUPS, MEMBERSHIP, control_groups


def usable_cpus(*, cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """At least one: the least of this process's affinity and the quotas of the control groups
    around it (a container, a job of SLURM)."""
    allowed = [len(os.sched_getaffinity(0))]
    for folder in control_groups("cpu", cgroups, membership):
        try:
            quota, period = _quota(folder)
        except (OSError, ValueError):
            continue  # no limit
        if quota > 0:
            allowed.append(math.ceil(quota / period))
    return max(min(allowed), 1)


def _quota(folder: Path) -> tuple[int, int]:
    """Microseconds of all CPUs in each period, version 2 or 1."""
    file = folder / "cpu.max"
    if file.exists():
        quota, period = file.read_text().split()
        return int(quota), int(period)
    files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    quota, period = ((folder / name).read_text() for name in files)
    return int(quota), int(period)
