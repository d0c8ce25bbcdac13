"""How many threads a pod may use, and work on several."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kubetuner.threads import available_cpus, in_threads


@pytest.mark.parametrize(("text", "expected"), [("100000 100000", 1), ("150000 100000", 1), ("20000 100000", 1)])
def test_the_cgroup_limit_holds(tmp_path: Path, text: str, expected: int) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")

    assert available_cpus(tmp_path) == expected


def test_without_a_limit_the_affinity_decides(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000\n")

    assert available_cpus(tmp_path) == available_cpus(tmp_path / "none") >= 1


def test_version_1_of_cgroups_is_read(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")

    assert available_cpus(tmp_path) == 1


def test_results_come_in_order() -> None:
    def work(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number * number

    assert list(in_threads(work, range(50), 4, "test")) == [number * number for number in range(50)]


def test_little_is_begun_ahead() -> None:
    asked = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            asked.append(number)
            yield number

    results = in_threads(str, numbers(), 2, "test")
    assert next(results) == "0"
    assert len(asked) < 30
    results.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test_")]


def test_an_exception_ends_the_work() -> None:
    done = []

    def work(number: int) -> None:
        if number == 3:
            raise ValueError(number)
        done.append(number)

    with pytest.raises(ValueError, match="3"):
        list(in_threads(work, range(1000), 2, "test"))
    assert len(done) < 30
