"""How many threads torch should use in a container.

Torch counts the node's cores, but a pod may use only its CPU limit; more threads than that wait for each other.
"""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cpus(cgroup: Path = CGROUP) -> int:
    """CPUs this process may use: the smaller of its affinity and its cgroup limit, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _cgroup_limit(cgroup)
    return allowed if limit is None else max(1, min(allowed, int(limit)))


def limit_threads() -> int:
    """Lower torch's thread count to :func:`available_cpus`, never raise it; returns the count in use."""
    import torch

    if available_cpus() < torch.get_num_threads():
        torch.set_num_threads(available_cpus())
    return torch.get_num_threads()


def _cgroup_limit(cgroup: Path) -> float | None:
    """CPUs of the cgroup (version 2, then 1), ``None`` when there is no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
