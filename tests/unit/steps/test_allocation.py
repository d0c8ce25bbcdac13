import subprocess
import sys
from pathlib import Path

import pytest

# Page faults of four arrays of 64 MiB, each freed before the next.
_SCRIPT = """
import resource, sys
import numpy
from kubetuner.steps.allocation import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
numpy.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    numpy.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no mallopt")
def test_freed_memory_is_used_again(tmp_path: Path) -> None:
    script = tmp_path / "faults.py"
    script.write_text(_SCRIPT, encoding="utf-8")
    given_back, kept = (
        int(subprocess.run([sys.executable, script, how], check=True, capture_output=True, text=True).stdout)
        for how in ("leave", "keep")
    )
    assert kept * 4 < given_back
