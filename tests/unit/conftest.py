"""Child processes that may be killed."""

import os
import threading
import warnings
from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """A child process that does ``work`` and exits with 0, or with 1 where it raises."""
    with warnings.catch_warnings():
        # Other threads of the test process do not matter to the child: it uses none of what they may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def wait(child: int) -> int:
    """The child's exit code; below 0 for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fetchers_end() -> None:
    """Wait until nothing is fetched in the background any more."""
    for thread in threading.enumerate():
        if thread.name == "kubetuner-fetch":
            thread.join(10)
