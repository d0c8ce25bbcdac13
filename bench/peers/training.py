"""Training beside SimpleTuner and diffusers' examples: CPU per step, and how soon the first step is done.

The trainers and the floor (:mod:`bench.peers.floor`) take turns as fresh processes on the same pictures, models and
settings, each from its own finished caches. Run
``python -m bench.peers.training [--sizes tiny,mid] [--peers SimpleTuner,diffusers] [--rounds 3]``.
"""

import argparse
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from bench.measure import report, table
from bench.peers.workload import SCRIPTS, WORKS, Examples, Ours, Theirs, Times, Work
from pipelines.recipes.demo.models import FAMILIES, Size

PAGE = Path(__file__).with_name("README.md")
PICTURES = 64
STEPS = {"tiny": 60, "mid": 24}
PEERS = ("SimpleTuner", "diffusers")
OURS = "kubetuner"

Rounds = Mapping[str, Sequence[Times]]
"""Of each side, what it took in each round."""


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="tiny,mid")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--peers", default=",".join(PEERS), help="a work that none of them does is left out")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    families, peers = arguments.families.split(","), arguments.peers.split(",")
    works = [work for work in WORKS if work.family in families and ("SimpleTuner" in peers or work in SCRIPTS)]
    for size in (size for size in get_args(Size) if size in arguments.sizes.split(",")):
        compare(size, works, peers, arguments.rounds)


def compare(size: Size, works: Sequence[Work], peers: Sequence[str], rounds: int) -> None:
    """Write the two tables of one size."""
    steps_table, first_table, loads = [], [], []
    for work in works:
        with tempfile.TemporaryDirectory() as scratch:
            times = measure(work, size, peers, rounds, Path(scratch))
        steps_table.append(step_row(work, times))
        first_table.append(first_row(work, times))
        loads.append(os.getloadavg()[1])
        print(size, steps_table[-1], first_table[-1], f"load {loads[-1]:.1f}", flush=True)
    beside = (
        f"{rounds} rounds in which the sides take turns; the machine's load was {min(loads):.0f} to {max(loads):.0f}."
    )
    faster = [f"faster than {peer} by" for peer in PEERS]
    head = ["family", "type", "floor", *PEERS, OURS, *faster, "above the floor"]
    note = (
        f"\n\nCPU milliseconds a step, one thread, medians of {STEPS[size]} steps without the first third; {beside} "
        f"float32, batches of 4, AdamW, from finished caches. Above the floor: {', '.join((*PEERS, OURS))}."
    )
    report(f"Training steps, {size} models", table(head, steps_table) + note, PAGE)
    head = ["family", "type", *PEERS, OURS, *(f"sooner than {peer} by" for peer in PEERS)]
    note = "\n\nFrom the start of the process to its first step: CPU seconds and, in brackets, seconds by the clock. "
    report(f"First step, {size} models", table(head, first_table) + f"{note}Medians of {beside}", PAGE)


def measure(work: Work, size: Size, peers: Sequence[str], rounds: int, scratch: Path) -> Rounds:
    """Let the sides take turns, the chosen ``peers`` first."""
    sides: dict[str, Callable[[], Times]] = {}
    steps = STEPS[size]
    if "SimpleTuner" in peers:
        theirs = Theirs.prepare(work, size, PICTURES, scratch / "theirs")
        theirs.train(1)
        sides["SimpleTuner"] = partial(theirs.train, steps)
    if "diffusers" in peers and work in SCRIPTS:
        examples = Examples.prepare(work, size, PICTURES, scratch / "examples")
        examples.train(steps)
        sides["diffusers"] = partial(examples.train, steps)
    ours = Ours.prepare(work, size, PICTURES, scratch / "ours")
    ours.plan(steps)
    ours.cache()
    sides |= {OURS: ours.train, "floor": partial(ours.floor, steps)}
    times: dict[str, list[Times]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, train in sides.items():
            times[side].append(train())
    return times


def step_row(work: Work, times: Rounds) -> list[str]:
    """CPU milliseconds of a step."""
    costs = {side: step_cost(runs) for side, runs in times.items()}
    floor, ours = costs.pop("floor"), costs[OURS]
    shown = {side: f"{cost:.1f}" for side, cost in costs.items()}
    above = [f"{costs[side] - floor:.1f}" if side in costs else "-" for side in (*PEERS, OURS)]
    ratios = [f"{costs[peer] / ours:.2f}" if peer in costs else "-" for peer in PEERS]
    cells = [shown.get(side, "-") for side in (*PEERS, OURS)]
    return [work.family, work.model_type, f"{floor:.1f}", *cells, *ratios, ", ".join(above)]


def step_cost(rounds: Sequence[Times]) -> float:
    """Median CPU milliseconds of a step, without each run's first third."""
    costs = []
    for times in rounds:
        taken = [1000 * (after[0] - before[0]) for before, after in itertools.pairwise(times.steps)]
        costs += taken[len(taken) // 3 :]
    return statistics.median(costs)


def first_row(work: Work, times: Rounds) -> list[str]:
    """Seconds to the first step."""
    firsts = {
        side: tuple(statistics.median(run.steps[0][clock] for run in runs) for clock in (0, 1))
        for side, runs in times.items()
    }
    our_cpu, our_wall = firsts[OURS]
    shown = {side: f"{cpu:.1f} ({wall:.1f})" for side, (cpu, wall) in firsts.items()}
    ratios = {side: f"{cpu / our_cpu:.1f} ({wall / our_wall:.1f})" for side, (cpu, wall) in firsts.items()}
    cells = [shown.get(side, "-") for side in (*PEERS, OURS)]
    return [work.family, work.model_type, *cells, *(ratios.get(peer, "-") for peer in PEERS)]


if __name__ == "__main__":
    main()
