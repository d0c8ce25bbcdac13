import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.real_models import Case, count, write_schedulers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def schedulers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schedulers")
    write_schedulers(folder)
    return folder


@pytest.mark.parametrize(
    ("case", "parameters", "forward", "whole"),
    [
        (Case("pixart_sigma", "full", 512), 611e6, 1.29e12, 3.86e12),
        (Case("sana", "full", 512), 1604e6, 0.84e12, 2.51e12),
        (Case("sana", "lora", 512), 1604e6, 0.84e12, 1.57e12),
    ],
    ids=str,
)
def test_operations_are_those_counted_before(
    schedulers: Path, case: Case, parameters: float, forward: float, whole: float
) -> None:
    """Against an independent count; torch's own formula says 55e12 instead of 8.9e12 for Sana at 1024 px."""
    counted = count(case, schedulers / case.family)

    assert counted.parameters == pytest.approx(parameters, rel=0.02)
    assert counted.forward == pytest.approx(forward, rel=0.02)
    assert counted.whole == pytest.approx(whole, rel=0.02)


def test_the_bench_measures_our_own_loop() -> None:
    """On tiny models; a process of its own, as the bench changes settings of torch."""
    command = [sys.executable, "-m", "bench.gpu_training", "--smoke", "--batches", "2"]
    command += ["--cases", "sdxl-lora-512", "--variants", "ours,recomputed+unfused+channels-last"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| sdxl")]
    assert [row[:3] for row in rows] == [
        ["sdxl lora 64 px (tiny)", "2", "ours"],
        ["sdxl lora 64 px (tiny)", "2", "recomputed+unfused+channels-last"],
    ]
    assert all(float(row[3]) > 0 and float(row[4]) > 0 and 0.1 < float(row[6]) < 20 for row in rows)
