"""Turn what kfp.local prints into short lines, and learn from it which step ran, how long, and how it ended.

kfp.local 2.17 has no hooks: its only account of a run is its log. This module reads that log, so it is the one place
that knows kfp's wording; ``tests/pipelines/test_local_run.py`` runs the real thing against it.
"""

import io
import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_KFP_LINE = re.compile(r"^\s*\d\d:\d\d:\d\d\.\d{3} - (?:DEBUG|INFO|WARNING|ERROR) - (.*)$")
_EXECUTOR_LINE = re.compile(r"^\[KFP Executor [^\]]*\]: ?(.*)$")
_STARTED = re.compile(r"^Executing task '(.+)'$")
_ENDED = re.compile(r"^Task '(.+)' finished with status (\w+)$")
_HIT = re.compile(r"^Task (\S+) cache hit \(key=")
_OUTPUTS = re.compile(r"^Task '(.+)' (?:outputs:|has no outputs)$")
_EXECUTOR_NOISE = ("Looking for component ", "Loading KFP component ", "Wrote executor output file ")
_INPUT_MARK = "Got executor_input:"
TRACEBACK = "Traceback (most recent call last)"
_TAIL_LINES = 400
# Tasks that only make fan-out possible; they are of no interest to a person unless they fail.
HELPERS = frozenset({"split"})


@dataclass
class TaskLog:
    """What is known of one step: its times, whether it came from the cache, and its last lines."""

    started: float = 0.0
    ended: float = 0.0
    cached: bool = False
    failed: bool = False
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))

    @property
    def seconds(self) -> float:
        """Wall seconds from the first start to the last end of the step's tasks."""
        return max(0.0, self.ended - self.started)


@dataclass
class _Thread:
    """Per thread, because ParallelFor runs its iterations in threads that write to one stdout."""

    partial: str = ""
    task: str = ""
    started: float = 0.0
    json_text: str | None = None
    skipping: bool = False
    in_traceback: bool = False


class RunLog(io.TextIOBase):
    """Stands in for stdout while a pipeline runs.

    Args:
        terminal: Where the short lines go.
        full: Where every line goes, unabridged.
    """

    def __init__(self, terminal: TextIO, full: TextIO) -> None:
        self.tasks: dict[str, TaskLog] = {}
        self.faults: list[str] = []
        self._terminal, self._full = terminal, full
        self._threads: dict[int, _Thread] = {}
        self._lock = threading.Lock()

    def writable(self) -> bool:
        """Whether text can be written; it can."""
        return True

    def isatty(self) -> bool:
        """Whether this is a terminal; kfp is told that it is not."""
        return False

    def write(self, text: str) -> int:
        """Take in ``text`` and show the finished lines of it that matter."""
        with self._lock:
            state = self._threads.setdefault(threading.get_ident(), _Thread())
            *lines, state.partial = (state.partial + text).split("\n")
            for line in lines:
                plain = ANSI.sub("", line).rstrip()
                self._full.write(plain + "\n")
                self._line(state, plain)
        return len(text)

    def flush(self) -> None:
        """Flush both outputs."""
        self._full.flush()
        self._terminal.flush()

    def message(self, text: str, *, error: bool = False) -> None:
        """Take in one record of the root logger, where kfp announces cache hits and its own faults."""
        self._full.write(text + "\n")
        if error:
            self.faults.append(text)
        if match := _HIT.match(text):
            task = self._task(match[1])
            task.cached = True
            self._show(step_name(match[1]), "cache hit")

    def _line(self, state: _Thread, line: str) -> None:
        match = _KFP_LINE.match(line)
        if match is not None:
            state.skipping = False
            self._event(state, match[1])
        elif state.task and not state.skipping and line.strip():
            self._step_line(state, line.strip() if state.json_text is not None else line.removeprefix("    "))

    def _event(self, state: _Thread, text: str) -> None:
        now = time.monotonic()
        if match := _STARTED.match(text):
            state.task, state.started = match[1], now
            task = self._task(match[1])
            task.started = task.started or now
            state.in_traceback = False
            self._show(step_name(match[1]), "started")
        elif match := _ENDED.match(text):
            task = self._task(match[1])
            task.ended, task.failed = now, match[2] != "SUCCESS"
            self._show(step_name(match[1]), f"{'failed' if task.failed else 'done'} after {now - state.started:.1f} s")
            state.task = ""
        elif _OUTPUTS.match(text):
            state.skipping = True
        elif _HIT.match(text):
            self.message(text)

    def _step_line(self, state: _Thread, line: str) -> None:
        if state.json_text is not None:
            self._swallow_json(state, line)
            return
        match = _EXECUTOR_LINE.match(line.lstrip())
        text = match[1] if match else line
        if text.startswith(_INPUT_MARK):
            state.json_text = ""
            self._swallow_json(state, text.removeprefix(_INPUT_MARK))
        elif not text.startswith(_EXECUTOR_NOISE) and text.strip():
            self._task(state.task).tail.append(text)
            # A traceback goes to the log; its cause is the run's error message.
            state.in_traceback |= text.startswith(TRACEBACK)
            if not state.in_traceback:
                self._show(step_name(state.task), text)

    def _swallow_json(self, state: _Thread, line: str) -> None:
        state.json_text = f"{state.json_text or ''}{line}\n"
        if not line.endswith("}"):
            return
        try:
            json.loads(state.json_text)
        except ValueError:
            return
        state.json_text = None

    def _task(self, task: str) -> TaskLog:
        return self.tasks.setdefault(step_name(task), TaskLog())

    def _show(self, step: str, text: str) -> None:
        if step in HELPERS:
            return
        self._terminal.write(f"{step:<18} {text}\n")
        self._terminal.flush()


def cause_of(tail: Sequence[str]) -> tuple[str, list[str]]:
    """The reason a step gave for its failure, and the frames that led there (none for an error of kubetuner's own)."""
    starts = [index for index, line in enumerate(tail) if line.startswith(TRACEBACK)]
    if not starts:
        return "", list(tail)
    block = list(tail)[starts[-1] + 1 :]
    first = next((index for index, line in enumerate(block) if line and not line[0].isspace()), len(block))
    reason = "\n".join(block[first:])
    own = re.match(r"kubetuner\.[\w.]+Error: ", reason)
    return (reason[own.end() :], []) if own else (reason, block[:first])


class RootHandler(logging.Handler):
    """Passes the root logger's records to a :class:`RunLog`."""

    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.INFO)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Hand one record over."""
        self._log.message(ANSI.sub("", record.getMessage()), error=record.levelno >= logging.ERROR)


def step_name(task: str) -> str:
    """The component's name from kfp's name of its task: ``cache-vae-2`` is ``cache_vae``."""
    return re.sub(r"-\d+$", "", task).replace("-", "_")
