import subprocess
import sys
from pathlib import Path

import pytest

# Page faults of the memory for large pictures, four times four arrays of 16 MiB that are freed at the end of each turn.
_SCRIPT = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import numpy
from kubetuner.steps.allocation import keep_freed_memory, share_freed_memory

if "keep" in sys.argv:
    keep_freed_memory()
if "share" in sys.argv:
    share_freed_memory()
def picture():
    return [numpy.ones(1 << 21) for _ in range(4)]
def work():
    picture()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        picture()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
work()
with ThreadPoolExecutor(1) as pool:
    pool.submit(work).result()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no mallopt")
def test_freed_memory_is_used_again(tmp_path: Path) -> None:
    script = tmp_path / "faults.py"
    script.write_text(_SCRIPT, encoding="utf-8")

    def faults(*how: str) -> list[int]:
        done = subprocess.run([sys.executable, script, *how], check=True, capture_output=True, text=True)
        return [int(line) for line in done.stdout.split()]

    given_back, kept, shared = faults(), faults("keep"), faults("keep", "share")
    assert kept[0] * 4 < given_back[0]
    # The second figure is of a thread beside the main one.
    assert shared[0] * 4 < given_back[0]
    assert shared[1] * 4 < kept[1]
