"""Noticing that a process hangs: each one says every few seconds that it lives, and listens to the others.

Whoever trains waits for all others, and cannot tell one that takes long (it compiles, or saves a checkpoint) from one
that was stopped, or whose machine or network is gone. A thread can: it goes on while the process works, whatever it
works at, and stops with it. It also says how often its process has come to where all must come, so that one that lives
and does not come is known too. What was said lies in the store in which the processes have found each other.
"""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from kubetuner.environment import number_above_zero
from kubetuner.errors import TrainingError
from kubetuner.training.distributed.failures import report

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

TIMEOUT_VARIABLE = "KUBETUNER_PROCESS_TIMEOUT_MINUTES"
PATIENCE_VARIABLE = "KUBETUNER_PROCESS_PATIENCE_MINUTES"
WORDS_VARIABLE = "KUBETUNER_WORDS"
"""The folder that a launcher reads errors from; set by it."""
_MOST_SECONDS = 10.0
_LEFT = "left"


@dataclass(frozen=True)
class Limits:
    """How long the others wait for a process, in seconds.

    Attributes:
        silent: For one that is not heard of.
        absent: For one that lives and does not come: it may save a checkpoint or upload the model meanwhile.
    """

    silent: float = 600.0
    absent: float = 5400.0


def read_limits(environment: Mapping[str, str]) -> Limits:
    """The limits by :data:`TIMEOUT_VARIABLE` and :data:`PATIENCE_VARIABLE`, in minutes.

    Raises:
        InputError: A value is no number above 0.
    """
    return Limits(
        _seconds(environment, TIMEOUT_VARIABLE, Limits.silent, "how long a process may not be heard of"),
        _seconds(environment, PATIENCE_VARIABLE, Limits.absent, "how long the others wait for one that lives"),
    )


def _seconds(environment: Mapping[str, str], name: str, default: float, meaning: str) -> float:
    expected = f"minutes above 0: {meaning}; {default / 60:g} if it is not set."
    minutes = number_above_zero(environment, name, expected)
    return default if minutes is None else 60 * minutes


@dataclass
class _Heard:
    """What was last heard of another process, and for how many seconds nothing else has been.

    Attributes:
        absent: Seconds for which it has not come, and another one has.
    """

    said: str = ""
    silent: float = 0.0
    absent: float = 0.0

    @property
    def turns(self) -> int:
        """How often it had come."""
        return int(self.said.split()[2]) if self.said else 0


class Pulse:
    """While entered, a thread says that this process lives, and ends it when another has been silent for too long.

    Ending it is all that is left: its main thread waits for that other one inside NCCL or gloo, and hears nothing.

    Args:
        rank: This process.
        count: How many there are.
        limits: Of the others' patience.
        turns: How often this process has come to where all must come.
    """

    def __init__(self, rank: int, count: int, limits: Limits, turns: Callable[[], int]) -> None:
        self._rank, self._count, self._limits, self._turns = rank, count, limits, turns
        self._pause = min(_MOST_SECONDS, limits.silent / 10, limits.absent / 10)
        self._over, self._rounds = threading.Event(), 0
        self._thread = threading.Thread(target=self._run, name="kubetuner-pulse", daemon=True)
        self._watch = threading.Thread(target=self._watch_the_store, name="kubetuner-pulse-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(2 * self._pause)

    def _run(self) -> None:
        others = {rank: _Heard() for rank in range(self._count) if rank != self._rank}
        before, beats = time.monotonic(), 0
        store: TCPStore | None = None
        while True:
            over = self._over.wait(self._pause if beats else 0.0)
            passed, before, beats = self._since(before), time.monotonic(), beats + 1
            try:
                store = store or self._store()
                own = self._turns()
                said = f"{socket.gethostname()} {os.getpid()} {own} {_LEFT if over else beats}"
                store.set(_key(self._rank), said)
                if over:
                    return
                self._listen(store, others, own, passed)
                self._rounds += 1
            except RuntimeError as error:
                if over:  # The one that keeps the store has ended before this one.
                    return
                logger.debug("the store of the processes does not answer: %s", error)
            self._judge(others)

    def _watch_the_store(self) -> None:
        """One that is stopped refuses nothing: who asks it waits for ever."""
        before, seen, unanswered = time.monotonic(), 0, 0.0
        while not self._over.wait(self._pause):
            passed, before = self._since(before), time.monotonic()
            unanswered = unanswered + passed if self._rounds == seen else 0.0
            seen = self._rounds
            if unanswered > self._limits.silent:
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                self._end(self._silence([f"process 0, which keeps the store where they meet ({where}),"]))

    def _since(self, before: float) -> float:
        """Seconds; a process that was stopped itself, and goes on, has not listened meanwhile."""
        return min(time.monotonic() - before, 3 * self._pause)

    def _store(self) -> "TCPStore":
        """A connection of the thread's own: the main thread's may be waiting for something."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=max(self._pause, 1.0)))

    def _listen(self, store: "TCPStore", others: Mapping[int, _Heard], own: int, passed: float) -> None:
        most = max(own, *(heard.turns for heard in others.values()))
        for rank, heard in others.items():
            said, before = store.get(_key(rank)).decode() if store.check([_key(rank)]) else "", heard.turns
            left = said.endswith(_LEFT)
            heard.silent = 0.0 if said != heard.said or left else heard.silent + passed
            heard.said = said
            came = heard.turns != before or heard.turns >= most or left
            heard.absent = 0.0 if came else heard.absent + passed

    def _judge(self, others: Mapping[int, _Heard]) -> None:
        silent = [_name(rank, heard.said) for rank, heard in others.items() if heard.silent > self._limits.silent]
        absent = [_name(rank, heard.said) for rank, heard in others.items() if heard.absent > self._limits.absent]
        if silent:
            self._end(self._silence(silent))
        elif absent:
            self._end(
                f"{self._who(absent)} not come for {self._limits.absent / 60:g} minutes to where others wait, and "
                "still lives: a GPU hangs, a read does not return, or there is much to save or to upload. Run again to "
                f"go on from the last checkpoint. {PATIENCE_VARIABLE} sets how long to wait."
            )

    def _silence(self, names: list[str]) -> str:
        return (
            f"{self._who(names)} not been heard of for {self._limits.silent / 60:g} minutes, and all others wait: "
            "stopped, or the machine hangs or has lost its network. Run again to go on from the last checkpoint. "
            f"{TIMEOUT_VARIABLE} sets how long to wait."
        )

    def _who(self, names: list[str]) -> str:
        return f"{', '.join(names)} of {self._count} {'have' if len(names) > 1 else 'has'}"

    def _end(self, message: str) -> None:
        """Tell of it, and end this process."""
        error = TrainingError(message)
        if folder := os.environ.get(WORDS_VARIABLE):
            report(Path(folder), self._rank, error)
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)


def _key(rank: int) -> str:
    return f"kubetuner/pulse/{rank}"


def _name(rank: int, said: str) -> str:
    """A process for a person: what it last said begins with its machine and its number there."""
    host, number = said.split()[:2] if said else ("", "")
    return f"process {rank} (number {number} on {host})" if said else f"process {rank}"
