"""Measuring on a machine that others use too, in turns; and where the figures are kept."""

import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).with_name("README.md")


class Spent(NamedTuple):
    """What a piece of work took, in seconds.

    Attributes:
        cpu: Of this process, on all cores; the median of some rounds.
        wall: By the clock; the shortest of them, which others have disturbed least.
    """

    cpu: float
    wall: float


def alternate(rounds: int, works: Mapping[str, Callable[[], object]]) -> dict[str, Spent]:
    """What each of ``works`` takes; they take turns, so that load hits all alike."""
    times: dict[str, list[Spent]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            times[name].append(Spent(time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: Spent(statistics.median(one.cpu for one in spent), min(one.wall for one in spent))
        for name, spent in times.items()
    }


def in_child(module: str, call: str, variables: Mapping[str, str] | None = None) -> str:
    """The last line that ``call`` prints in a fresh process after ``from <module> import *``, ``variables`` set."""
    command = [sys.executable, "-c", f"from {module} import *; {call}"]
    environment = {**os.environ, **(variables or {}), "PYTHONPATH": os.pathsep.join(["src", "."])}
    done = subprocess.run(command, cwd=README.parents[1], env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1]


def peak_memory() -> str:
    """Peak resident memory and what is resident now without mapped files, of this process, in MB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    values = {name: int(size) / 1024 for name, size in re.findall(r"(\w+):\s+(\d+) kB", status)}
    return f"{values['VmHWM']:.0f} {values['RssAnon']:.0f}"


def report(section: str, text: str, page: Path = README) -> None:
    """Print ``text`` and put it under the heading ``section`` of ``page``, with date and machine."""
    machine = f"{os.cpu_count()} shared cores ({platform.machine()}), other jobs running"
    dated = f"{datetime.date.today().isoformat()}, {machine}.\n\n{text}\n"
    print(dated)
    old = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(## {re.escape(section)}\n\n).*?(?=\n## |\Z)", re.DOTALL)
    if not pattern.search(old):
        old = f"{old.rstrip()}\n\n## {section}\n\n"
    page.write_text(pattern.sub(lambda found: found[1] + dated, old), encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
