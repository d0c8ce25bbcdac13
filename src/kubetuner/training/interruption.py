"""Being told to stop: Kubernetes sends SIGTERM before it takes a pod away."""

import signal
import threading
import time
from types import FrameType
from typing import Self

from kubetuner.errors import TrainingError


class TerminatedError(TrainingError):
    """SIGTERM arrived; the state was saved and running again resumes."""


class StopRequest:
    """While entered, SIGTERM only sets :attr:`received`; outside the main thread it does nothing."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_exc: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)

    def wait(self, seconds: float) -> bool:
        """Sleep for ``seconds``, or until SIGTERM arrives; whether it has."""
        end = time.monotonic() + seconds
        while not self.received and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return self.received

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True
