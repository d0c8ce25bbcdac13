"""Training beside SimpleTuner: CPU per step, and how soon the first step is done.

The two trainers and the floor (:mod:`bench.peers.floor`) take turns as fresh processes on the same pictures, models and
settings, each from its own finished caches. Run ``python -m bench.peers.training [--sizes tiny,mid] [--rounds 3]``.
"""

import argparse
import itertools
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from bench.measure import report, table
from bench.peers.workload import WORKS, Ours, Theirs, Times, Work
from pipelines.recipes.demo.models import FAMILIES, Size

PAGE = Path(__file__).with_name("README.md")
PICTURES = 64
STEPS = {"tiny": 60, "mid": 24}
SIDES = ("SimpleTuner", "kubetuner", "floor")


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="tiny,mid")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for size in (size for size in get_args(Size) if size in arguments.sizes.split(",")):
        compare(size, arguments.families.split(","), arguments.rounds)


def compare(size: Size, families: Sequence[str], rounds: int) -> None:
    """Write the two tables of one size."""
    steps_table, first_table, loads = [], [], []
    for work in (work for work in WORKS if work.family in families):
        with tempfile.TemporaryDirectory() as scratch:
            times = measure(work, size, STEPS[size], rounds, Path(scratch))
        steps_table.append(step_row(work, times))
        first_table.append(first_row(work, times))
        loads.append(os.getloadavg()[1])
        print(size, steps_table[-1], first_table[-1], f"load {loads[-1]:.1f}", flush=True)
    beside = (
        f"{rounds} rounds in which the sides take turns; the machine's load was {min(loads):.0f} to {max(loads):.0f}."
    )
    head = ["family", "type", "floor", "SimpleTuner", "kubetuner", "ours is faster by", "above the floor"]
    note = (
        f"\n\nCPU milliseconds a step, one thread, medians of {STEPS[size]} steps without the first third; {beside} "
        "float32, batches of 4, AdamW, from finished caches. Above the floor: SimpleTuner, kubetuner."
    )
    report(f"Training steps, {size} models", table(head, steps_table) + note, PAGE)
    head = ["family", "type", "SimpleTuner", "kubetuner", "ours is sooner by"]
    note = "\n\nFrom the start of the process to its first step: CPU seconds and, in brackets, seconds by the clock. "
    report(f"First step, {size} models", table(head, first_table) + f"{note}Medians of {beside}", PAGE)


def measure(work: Work, size: Size, steps: int, rounds: int, scratch: Path) -> dict[str, list[Times]]:
    """What each side took in each round."""
    theirs = Theirs.prepare(work, size, PICTURES, scratch / "theirs")
    ours = Ours.prepare(work, size, PICTURES, scratch / "ours")
    theirs.train(1)
    ours.plan(steps)
    ours.cache()
    times: dict[str, list[Times]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        times["SimpleTuner"].append(theirs.train(steps))
        times["kubetuner"].append(ours.train())
        times["floor"].append(ours.floor(steps))
    return times


def step_row(work: Work, times: dict[str, list[Times]]) -> list[str]:
    """CPU milliseconds of a step."""
    theirs, ours, floor = (step_cost(times[side]) for side in SIDES)
    return [
        work.family, work.model_type, f"{floor:.1f}", f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}",
        f"{theirs - floor:.1f}, {ours - floor:.1f}",
    ]  # fmt: skip


def step_cost(rounds: Sequence[Times]) -> float:
    """Median CPU milliseconds of a step, without each run's first third."""
    costs = []
    for times in rounds:
        taken = [1000 * (after[0] - before[0]) for before, after in itertools.pairwise(times.steps)]
        costs += taken[len(taken) // 3 :]
    return statistics.median(costs)


def first_row(work: Work, times: dict[str, list[Times]]) -> list[str]:
    """Seconds to the first step."""
    firsts = {side: [run.steps[0] for run in times[side]] for side in SIDES}
    (their_cpu, their_wall), (our_cpu, our_wall) = (
        (statistics.median(cpu for cpu, _ in firsts[side]), statistics.median(wall for _, wall in firsts[side]))
        for side in SIDES[:2]
    )
    return [
        work.family, work.model_type, f"{their_cpu:.1f} ({their_wall:.1f})", f"{our_cpu:.1f} ({our_wall:.1f})",
        f"{their_cpu / our_cpu:.1f} ({their_wall / our_wall:.1f})",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
