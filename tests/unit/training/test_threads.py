from pathlib import Path

import pytest

from kubetuner.training.threads import available_cpus


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
