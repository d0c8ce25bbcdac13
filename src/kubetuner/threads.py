"""Threads: how many a pod may use, torch's among them, and work on several with results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

CGROUP = Path("/sys/fs/cgroup")

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def available_cpus(cgroup: Path = CGROUP) -> int:
    """CPUs this process may use: the smaller of its affinity and its cgroup limit, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _cgroup_limit(cgroup)
    return allowed if limit is None else max(1, min(allowed, int(limit)))


def limit_threads() -> int:
    """Lower torch's thread count to :func:`available_cpus`, never raise it; returns the count in use.

    Torch counts the node's cores, but a pod may use only its CPU limit; more threads than that wait for each other.
    """
    import torch

    if available_cpus() < torch.get_num_threads():
        torch.set_num_threads(available_cpus())
    return torch.get_num_threads()


def in_threads(
    work: Callable[[Argument], Result], items: Iterable[Argument], threads: int, name: str, *, ahead: int = 8
) -> Iterator[Result]:
    """``work`` of every item, in the order of ``items``.

    Args:
        work: Called on several threads; its exception is raised here, and nothing more is begun.
        items: What to work on.
        threads: At least 1.
        name: Of the threads.
        ahead: So many items a thread are begun before their turn, so memory does not grow with their number.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > threads * ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


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
