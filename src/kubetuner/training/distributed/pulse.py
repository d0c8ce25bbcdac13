"""Noticing that a process hangs: each one says every few seconds that it lives, and listens to the others.

Whoever trains waits for all others, and cannot tell one that takes long (it compiles, or saves a checkpoint) from one
that was stopped, or whose machine or network is gone. A thread can: it goes on while the process works, whatever it
works at, and stops with it. What was said lies in the store in which the processes have found each other.
"""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from kubetuner.errors import InputError, TrainingError
from kubetuner.training.distributed.failures import report

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

TIMEOUT_VARIABLE = "KUBETUNER_PROCESS_TIMEOUT_MINUTES"
DEFAULT_MINUTES = 10.0
WORDS_VARIABLE = "KUBETUNER_WORDS"
"""The folder that a launcher reads errors from; set by it."""
_MOST_SECONDS = 10.0
_LEFT = "left"


def timeout_seconds(environment: Mapping[str, str]) -> float:
    """How long a process may be silent before the others give it up.

    Raises:
        InputError: The environment's value is no number above 0.
    """
    text = environment.get(TIMEOUT_VARIABLE, "")
    try:
        minutes = float(text) if text else DEFAULT_MINUTES
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise InputError(
            f"{TIMEOUT_VARIABLE} is {text!r}; expected minutes above 0: how long a process may not be heard of before "
            f"the others end, {DEFAULT_MINUTES:g} where it is not set."
        )
    return 60 * minutes


@dataclass
class _Heard:
    """What was last heard of another process, and for how many seconds nothing else has been."""

    said: str = ""
    silent: float = 0.0


class Pulse:
    """While entered, a thread says that this process lives, and ends it when another has been silent for too long.

    Ending it is all that is left: its main thread waits for that other one inside NCCL or gloo, and hears nothing.

    Args:
        rank: This process.
        count: How many there are.
        limit: Seconds of silence.
    """

    def __init__(self, rank: int, count: int, limit: float) -> None:
        self._rank, self._count, self._limit = rank, count, limit
        self._pause = min(_MOST_SECONDS, limit / 10)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kubetuner-pulse", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(2 * self._pause)

    def _run(self) -> None:
        others = {rank: _Heard() for rank in range(self._count) if rank != self._rank}
        unreachable, before, beats = 0.0, time.monotonic(), 0
        store: TCPStore | None = None
        while True:
            over = self._over.wait(self._pause if beats else 0.0)
            # A process that was stopped itself, and goes on, has not listened meanwhile.
            passed = min(time.monotonic() - before, 3 * self._pause)
            before, beats = time.monotonic(), beats + 1
            try:
                store = store or self._store()
                store.set(_key(self._rank), _LEFT if over else f"{socket.gethostname()} {os.getpid()} {beats}")
                if over:
                    return
                self._listen(store, others, passed)
                unreachable = 0.0
            except RuntimeError as error:
                if over:  # The one that keeps the store has ended before this one.
                    return
                unreachable += passed
                logger.debug("the store of the processes does not answer: %s", error)
            self._judge(others, unreachable)

    def _store(self) -> "TCPStore":
        """A connection of the thread's own: the main thread's may be waiting for something."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=max(self._pause, 1.0)))

    def _listen(self, store: "TCPStore", others: Mapping[int, _Heard], passed: float) -> None:
        for rank, heard in others.items():
            said = store.get(_key(rank)).decode() if store.check([_key(rank)]) else ""
            heard.silent = 0.0 if said != heard.said or said == _LEFT else heard.silent + passed
            heard.said = said

    def _judge(self, others: Mapping[int, _Heard], unreachable: float) -> None:
        if unreachable > self._limit:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            self._end([f"process 0, which keeps the store in which they meet ({where}),"])
        silent = [_name(rank, heard.said) for rank, heard in others.items() if heard.silent > self._limit]
        if silent:
            self._end(silent)

    def _end(self, silent: list[str]) -> None:
        """Tell of it, and end this process."""
        who = f"{', '.join(silent)} of {self._count} {'have' if len(silent) > 1 else 'has'}"
        error = TrainingError(
            f"{who} not been heard of for {self._limit / 60:g} minutes, and all others wait: stopped, or the machine "
            "hangs or has lost its network. Run again to go on from the last checkpoint. "
            f"{TIMEOUT_VARIABLE} sets how long to wait."
        )
        if folder := os.environ.get(WORDS_VARIABLE):
            report(Path(folder), self._rank, error)
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)


def _key(rank: int) -> str:
    return f"kubetuner/pulse/{rank}"


def _name(rank: int, said: str) -> str:
    """A process for a person: what it last said begins with its machine and its number there."""
    host, _, rest = said.partition(" ")
    return f"process {rank} (number {rest.split()[0]} on {host})" if rest else f"process {rank}"
