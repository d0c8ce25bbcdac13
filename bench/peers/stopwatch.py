"""Runs a module as ``python -m`` would, and notes its times: every optimizer step, and the calls that are named.

Both sides of the benches are run by it, so that both are measured by the same hook of PyTorch. It imports nothing of
ours: SimpleTuner runs in an environment of its own.

``python stopwatch.py TIMES.json MODULE [ARGUMENTS...]``; ``STOPWATCH_STARTED`` may hold ``time.perf_counter()`` of the
parent. The file holds ``steps`` (CPU and wall seconds after each optimizer step) and ``calls`` (name to a list of CPU
seconds); CPU is of all threads of the process.
"""

import atexit
import functools
import json
import os
import runpy
import sys
import time
from collections import defaultdict
from pathlib import Path

STEPS: list[tuple[float, float]] = []
CALLS: dict[str, list[float]] = defaultdict(list)


def main() -> None:
    """Note the times of ``sys.argv[2]``."""
    start(Path(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def start(file: Path) -> None:
    """Note times from now on, and write them when the process ends."""
    atexit.register(write, file)
    watch_optimizers(float(os.environ.get("STOPWATCH_STARTED") or time.perf_counter()))


def watch_optimizers(started: float) -> None:
    """Note the times after every step of every optimizer."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def note(*_: object) -> None:
        STEPS.append((time.process_time(), time.perf_counter() - started))

    register_optimizer_step_post_hook(note)


def watch_call(owner: type, method: str) -> None:
    """Note the CPU time of every call of a method."""
    plain = getattr(owner, method)

    @functools.wraps(plain)
    def timed(*arguments: object, **named: object) -> object:
        before = time.process_time()
        try:
            return plain(*arguments, **named)
        finally:
            CALLS[f"{owner.__name__}.{method}"].append(time.process_time() - before)

    setattr(owner, method, timed)


def write(file: Path) -> None:
    """Keep what was noted."""
    file.write_text(json.dumps({"steps": STEPS, "calls": CALLS}), encoding="utf-8")


if __name__ == "__main__":
    main()
