"""Importing torch and diffusers without the garbage collector.

Classes and functions make about a million objects that refer to each other, and none of them ever goes. Left alone, the
collector walks through all of them again and again while they come: a third of the time that importing takes.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of large libraries and nothing else: what they made is never looked at by the collector.

    Nothing that is to go should be made inside. Where all was imported before, nothing happens.
    """
    collects, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if collects:
            gc.enable()
