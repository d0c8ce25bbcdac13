"""Sends journals to MLflow, in the background."""

import logging
import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

from kubetuner.tracking.journal import Entry, Journal
from kubetuner.tracking.server import Server, Settings

logger = logging.getLogger(__name__)

SEND_SECONDS = 3.0
"""Between two deliveries."""
DIED = "the step's process ended without a word: killed, out of memory, or its machine was lost"
_REFUSED = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}
)
"""Error codes that sending again would not change."""
_REFUSED_STATUS = frozenset({400, 404, 405, 413, 414, 422})
"""The same for files, of which MLflow (or a proxy before it) answers with plain HTTP."""


def masked(text: str) -> str:
    """``text`` without the passwords of its URLs."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def first_line(error: BaseException) -> str:
    """A short text for a log line."""
    return masked((str(error).splitlines() or [""])[0])[:300] or type(error).__name__


def deliver(server: Server, journal: Journal) -> None:
    """Send what ``journal`` holds, in order; after an exception the next call goes on where this one stopped.

    What is sent again because the answer was lost does no harm: MLflow keeps equal points once, and a run is found
    by the journal's name.
    """
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    while batch := journal.head():
        run_id = journal.run_id
        try:
            run_id = _send(server, journal, batch)
        except (MlflowException, HTTPError) as error:
            if not run_id or not _refused(error):
                raise
            logger.warning("run %s: MLflow refused %s %s: %s", run_id, batch[0].kind, batch[0].key, first_line(error))
        journal.note_sent(len(batch), run_id)


def _refused(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return getattr(error, "error_code", "") in _REFUSED or status in _REFUSED_STATUS


def _send(server: Server, journal: Journal, batch: list[Entry]) -> str:
    """Send one call's entries; returns the run's id."""
    first, run_id = batch[0], journal.run_id
    match first.kind:
        case "start":
            return run_id or server.create_run(first, journal.name)
        case "metric":
            server.log_points(run_id, batch)
        case "params":
            server.log_params(run_id, first.params)
        case "image":
            server.log_image(run_id, first)
        case "text":
            server.log_text(run_id, first)
        case "end":
            server.end_run(run_id, first)
        case "finish":
            server.finish_group(first, journal.name)
    return run_id


def replay(server: Server, folder: Path) -> None:
    """Send what earlier steps left in ``folder``; a run whose step died without a word is ended as FAILED."""
    for path in sorted(folder.glob("*.jsonl")):
        try:
            journal = Journal.adopt(path)
        except FileNotFoundError:
            continue  # sent by another step just now
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read and is not sent: %s", path, error)
            continue
        if journal is None:
            continue  # its step is still at work
        delivered = False
        try:
            if journal.unended:
                journal.append(Entry(kind="end", status="FAILED", note=DIED, time=journal.last_time))
            deliver(server, journal)
            delivered = True
            logger.info("sent what an earlier step could not: %s", path)
        except Exception as error:  # noqa: BLE001 - tracking must not stop the step, whatever the client raises
            logger.warning("%s stays in the spool: %s", path, first_line(error))
        finally:
            journal.close(delivered=delivered)


def in_background(work: Callable[[], None]) -> "Future[None]":
    """Run ``work`` on a thread that does not keep the process alive."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except Exception as error:  # noqa: BLE001 - handed to the caller
            future.set_exception(error)

    threading.Thread(target=run, name="kubetuner-tracking", daemon=True).start()
    return future


class Sender(threading.Thread):
    """The thread that sends a run's journal; another one then sends what earlier steps left behind."""

    def __init__(self, settings: Settings, journal: Journal) -> None:
        super().__init__(name="kubetuner-tracking", daemon=True)
        self._settings, self._journal = settings, journal
        self._server: Server | None = None
        self._replay: Future[None] | None = None
        self._jobs: queue.Queue[Callable[[Server | None], None]] = queue.Queue()
        self._wake, self._closing = threading.Event(), threading.Event()
        self.started = threading.Event()
        """Set after the first attempt to reach the server."""

    def submit(self, job: Callable[[Server, str], str]) -> "Future[str]":
        """Run ``job(server, run_id)`` on this thread after what was logged before; fails when that cannot be sent."""
        future: Future[str] = Future()

        def work(server: Server | None) -> None:
            if future.set_running_or_notify_cancel():
                try:
                    if server is None:
                        raise ConnectionError(f"MLflow at {masked(self._settings.uri)} does not answer")
                    future.set_result(job(server, self._journal.run_id))
                except Exception as error:  # noqa: BLE001 - handed to the caller
                    future.set_exception(error)

        self._jobs.put(work)
        self._wake.set()
        return future

    def close(self, patience: float) -> None:
        """Send the rest, waiting at most ``patience`` seconds; what is left stays in the spool."""
        deadline = time.monotonic() + patience
        self._closing.set()
        self._wake.set()
        self.join(patience)
        if self.is_alive():
            where = masked(self._settings.uri)
            logger.warning("MLflow at %s does not answer; %s is sent by a later step", where, self._journal.path)
        elif self._replay is not None:
            wait([self._replay], timeout=deadline - time.monotonic())

    def run(self) -> None:
        """Deliver until closed; then once more."""
        failures = 0
        while True:
            closing = self._closing.is_set()
            self._wake.clear()
            delivered = self._deliver(failures)
            failures = 0 if delivered else failures + 1
            self.started.set()
            while not self._jobs.empty():
                self._jobs.get()(self._server if delivered else None)
            if delivered and self._replay is None:
                self._replay = in_background(lambda: replay(Server(self._settings), self._journal.path.parent))
            if closing:
                self._journal.close(delivered=delivered)
                return
            if not self._closing.is_set():
                self._wake.wait(min(60.0, SEND_SECONDS * 2 ** min(failures, 5)))

    def _deliver(self, failures: int) -> bool:
        try:
            if self._server is None:
                self._server = Server(self._settings)
            deliver(self._server, self._journal)
        except Exception as error:  # noqa: BLE001 - tracking must not stop the step, whatever the client raises
            if not failures:
                where = masked(self._settings.uri)
                logger.warning("MLflow at %s failed, will try again: %s", where, first_line(error))
            return False
        return True
