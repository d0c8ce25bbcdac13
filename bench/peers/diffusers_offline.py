"""Starts an example script of diffusers, as it is, on a machine without torchvision.

``python stopwatch.py TIMES.json bench.peers.diffusers_offline SCRIPT [ARGUMENTS...]``.
"""

import runpy
import sys

from bench.peers.offline import add_standins

if __name__ == "__main__":
    add_standins()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
