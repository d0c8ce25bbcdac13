"""Sends journals to MLflow from one background thread."""

import logging
import queue
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from kubetuner.tracking.journal import Entry, Journal
from kubetuner.tracking.server import Server, Settings

logger = logging.getLogger(__name__)

BATCH = 1000
"""Metrics that MLflow takes in one call."""
SEND_SECONDS = 3.0
"""Between two deliveries."""
_REFUSED = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}
)
"""Error codes that sending again would not change."""


def first_line(error: BaseException) -> str:
    """A short text for a log line."""
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__


def replay(server: Server, folder: Path) -> None:
    """Send what earlier steps left in ``folder``; a run whose step died without a word is ended as FAILED."""
    for path in sorted(folder.glob("*.jsonl")):
        try:
            journal = Journal.adopt(path)
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read and is not sent: %s", path, error)
            continue
        if journal is None:
            continue  # its step is still at work
        delivered = False
        try:
            kinds = {entry.kind for entry in journal.entries}
            if "start" in kinds and "end" not in kinds:
                journal.append(Entry(kind="end", text="FAILED", time=journal.entries[-1].time))
            Delivery(journal).advance(server)
            delivered = True
            logger.info("sent what an earlier step could not: %s", path)
        except Exception as error:  # noqa: BLE001 - tracking must not stop the step, whatever the client raises
            logger.warning("%s stays in the spool: %s", path, first_line(error))
        finally:
            journal.close(delivered=delivered)


class Delivery:
    """Sends one journal in order, every entry at least once."""

    def __init__(self, journal: Journal) -> None:
        self._journal, self._position = journal, 0
        self.run_id = next((entry.text for entry in reversed(journal.entries) if entry.kind == "run"), "")

    def advance(self, server: Server) -> None:
        """Send what is there; after an exception the next call goes on where this one stopped."""
        from mlflow.exceptions import MlflowException

        entries = self._journal.entries
        while self._position < len(entries):
            count = 1
            if entries[self._position].kind == "metric":
                batch = entries[self._position : self._position + BATCH]
                count = next((i for i, entry in enumerate(batch) if entry.kind != "metric"), len(batch))
            try:
                self._send(server, entries[self._position : self._position + count])
            except MlflowException as error:
                if error.error_code not in _REFUSED or not self.run_id:
                    raise
                logger.warning(
                    "run %s: MLflow refused %s: %s", self.run_id, entries[self._position].kind, first_line(error)
                )
            self._position += count

    def _send(self, server: Server, batch: list[Entry]) -> None:
        match batch[0].kind:
            case "start":
                if not self.run_id:
                    self.run_id = server.create_run(batch[0])
                    self._journal.append(Entry(kind="run", text=self.run_id))
            case "metric":
                server.log_points(self.run_id, batch)
            case "params":
                server.log_params(self.run_id, batch[0].params)
            case "image":
                server.log_image(self.run_id, batch[0])
            case "text":
                server.log_text(self.run_id, batch[0])
            case "end":
                server.end_run(self.run_id, batch[0].text, batch[0].time)
            case "run":
                pass


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
    """The one thread that talks to MLflow for a run."""

    def __init__(self, settings: Settings, journal: Journal) -> None:
        super().__init__(name="kubetuner-tracking", daemon=True)
        self._settings, self._journal = settings, journal
        self.delivery = Delivery(journal)
        self._server: Server | None = None
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
                        raise ConnectionError(f"MLflow at {self._where} does not answer")
                    future.set_result(job(server, self.delivery.run_id))
                except Exception as error:  # noqa: BLE001 - handed to the caller
                    future.set_exception(error)

        self._jobs.put(work)
        self._wake.set()
        return future

    def close(self, patience: float) -> None:
        """Send the rest, waiting at most ``patience`` seconds; what is left stays in the spool."""
        self._closing.set()
        self._wake.set()
        self.join(patience)
        if self.is_alive():
            logger.warning("MLflow at %s does not answer; %s is sent by a later step", self._where, self._journal.path)

    def run(self) -> None:
        """Deliver until closed; then once more."""
        failures, replayed = 0, False
        while True:
            closing = self._closing.is_set()
            self._wake.clear()
            delivered = self._deliver(failures)
            failures = 0 if delivered else failures + 1
            self.started.set()
            while not self._jobs.empty():
                self._jobs.get()(self._server if delivered else None)
            if delivered and not replayed and self._server is not None:
                replayed = True
                replay(self._server, self._journal.path.parent)
            if closing:
                self._journal.close(delivered=delivered)
                return
            if not self._closing.is_set():
                self._wake.wait(min(60.0, SEND_SECONDS * 2**failures))

    def _deliver(self, failures: int) -> bool:
        try:
            if self._server is None:
                self._server = Server(self._settings)
            self.delivery.advance(self._server)
        except Exception as error:  # noqa: BLE001 - tracking must not stop the step, whatever the client raises
            if not failures:
                logger.warning("MLflow at %s failed, will try again: %s", self._where, first_line(error))
            return False
        return True

    @property
    def _where(self) -> str:
        return re.sub(r"//[^/@]*@", "//***@", self._settings.uri)
