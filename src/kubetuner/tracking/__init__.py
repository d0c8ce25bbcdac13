"""Experiment tracking with MLflow that can neither stop nor slow a step.

Everything a step logs is first appended to a journal, a JSON Lines file in the spool folder. One background thread
makes all MLflow calls: it sends the journal in batches, and what it could not send stays in the spool until a later
step or run with the same spool, server and experiment sends it. Sending twice is harmless: MLflow keeps equal points
once. A step that was killed leaves a journal without an end; who finds it ends its run as FAILED.

Environment:
    MLFLOW_TRACKING_URI: Server or database; without it nothing is tracked.
    MLFLOW_EXPERIMENT_NAME: Default ``kubetuner``.
    KUBETUNER_RUN_ID: Groups the steps of one pipeline run under one parent run (tag ``kubetuner.run_id``).
    KUBETUNER_RUN_NAME: Name of that parent run; default ``KUBETUNER_RUN_ID``.
    MLFLOW_RUN_ID: Log into this run and never end it: its owner (Kubeflow's MLflow plugin) does.
    KUBETUNER_MLFLOW_ARTIFACTS: Folder for artifacts, used when the experiment is created.
    KUBETUNER_SPOOL: Spool folder; default ``$KUBETUNER_STORE/spool``. Where there is none, or it cannot be written, a
        folder in the temporary directory.
"""

import contextlib
import importlib.util
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

from kubetuner.errors import ArtifactError
from kubetuner.imports import importing
from kubetuner.tracking.journal import Entry, Journal
from kubetuner.tracking.sender import Sender, first_line, in_background, masked, replay
from kubetuner.tracking.server import Server, Settings, configure_client, upload_seconds

__all__ = ["Run", "Status", "fetch_model", "finish_parent", "track"]

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED"]


class Run(Protocol):
    """Where a step logs to."""

    @property
    def run_id(self) -> str:
        """The MLflow run, empty when there is none (yet)."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log a point of each metric; values that are not finite are left out."""
        ...

    def log_image(self, key: str, path: Path, step: int) -> None:
        """Log a picture; pictures of one ``key`` share a panel with a step slider."""
        ...

    def log_text(self, text: str, name: str) -> None:
        """Store ``text`` as the artifact ``name``."""
        ...

    def log_model(self, folder: Path, name: str) -> str:
        """Upload ``folder`` as a logged model; returns ``models:/<id>``, or empty when that was not possible."""
        ...


class _Untracked:
    """The run without MLflow."""

    run_id = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_image(self, key: str, path: Path, step: int) -> None: ...

    def log_text(self, text: str, name: str) -> None: ...

    def log_model(self, folder: Path, name: str) -> str:
        return ""


class _Tracked:
    """A run whose journal a :class:`Sender` sends."""

    def __init__(self, journal: Journal, sender: Sender) -> None:
        self._journal, self._sender = journal, sender
        self._warned: set[str] = set()

    @property
    def run_id(self) -> str:
        return self._journal.run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        now = _now()
        points = []
        for key, value in metrics.items():
            if math.isfinite(value):
                points.append(Entry(kind="metric", key=key, value=float(value), step=step, time=now))
            elif key not in self._warned:
                self._warned.add(key)
                logger.warning("metric %s is %s at step %d; points that are not finite are left out", key, value, step)
        self._journal.append(*points)

    def log_image(self, key: str, path: Path, step: int) -> None:
        self._journal.append(Entry(kind="image", key=key, text=str(path.resolve()), step=step, time=_now()))

    def log_text(self, text: str, name: str) -> None:
        self._journal.append(Entry(kind="text", key=name, text=text))

    def log_model(self, folder: Path, name: str) -> str:
        future = self._sender.submit(lambda server, run_id: server.log_model(run_id, folder, name))
        try:
            return future.result(timeout=upload_seconds(folder))
        except Exception as error:  # noqa: BLE001 - tracking must not stop the step, whatever the client raises
            future.cancel()
            logger.warning("the model was not logged to MLflow: %s", first_line(error))
            return ""


@contextlib.contextmanager
def track(step: str, params: Mapping[str, str]) -> Iterator[Run]:
    """Track ``step`` as a run of its own: FINISHED, or FAILED with the exception as tag ``kubetuner.error``.

    Args:
        step: Name of the run.
        params: Settings, logged as ``cfg/<name>``.

    Yields:
        The run. Its methods neither raise nor wait for the server, but for ``log_model``, whose wait is bounded.
    """
    settings = Settings.from_environment()
    opened = _open(settings, step, params)
    if opened is None:
        yield _Untracked()
        return
    journal, sender = opened
    end = Entry(kind="end", status="FINISHED")
    try:
        yield _Tracked(journal, sender)
    except BaseException as error:
        end = Entry(kind="end", status="FAILED", note=masked(f"{type(error).__name__}: {error}"))
        raise
    finally:
        if not settings.run_id:
            journal.append(end.model_copy(update={"time": _now()}))
        sender.close(settings.patience)


def finish_parent(status: Status) -> None:
    """End the parent run of ``KUBETUNER_RUN_ID``, after sending what its steps left behind.

    Children that are still running then are FAILED. Called once by who runs the pipeline, when all steps have ended.
    Waits a bounded time and never raises; what the server does not take waits in the spool for a later run.
    """
    settings = Settings.from_environment()
    if not settings.group or settings.run_id or not _available(settings):
        return
    journal = _create_journal(settings)
    if journal is None:
        return
    journal.append(Entry(kind="finish", text=settings.group, note=settings.group_name, status=status, time=_now()))
    journal.close(delivered=False)
    done = in_background(lambda: replay(Server(settings), journal.path.parent))
    try:
        done.result(timeout=settings.patience)
    except Exception as error:  # noqa: BLE001 - tracking must not fail the pipeline, whatever the client raises
        logger.warning("the MLflow run of %s was not ended as %s: %s", settings.group, status, first_line(error))


def fetch_model(uri: str, out: Path) -> Path:
    """Download the logged model ``models:/<id>`` to ``out``; returns the folder with its files.

    Raises:
        ArtifactError: There is no such model, or it cannot be fetched.
    """
    settings = Settings.from_environment()
    if not _available(settings):
        raise ArtifactError(
            f"{uri} cannot be fetched without MLflow: set MLFLOW_TRACKING_URI and install kubetuner[train]"
        )
    out.mkdir(parents=True, exist_ok=True)
    try:
        return Server(settings).fetch(uri, out)
    except Exception as error:
        raise ArtifactError(f"{uri} cannot be fetched from MLflow: {first_line(error)}") from error


def _open(settings: Settings, step: str, params: Mapping[str, str]) -> tuple[Journal, Sender] | None:
    if not _available(settings):
        return None
    journal = _create_journal(settings)
    if journal is None:
        return None
    if settings.run_id:
        journal.note_sent(0, settings.run_id)
    else:
        journal.append(Entry(kind="start", key=step, text=settings.group, note=settings.group_name, time=_now()))
    journal.append(Entry(kind="params", params=dict(params)))
    sender = Sender(settings, journal)
    sender.start()
    if not sender.started.wait(settings.patience):
        logger.warning("MLflow does not answer; the step goes on and what it logs waits in %s", journal.path)
    return journal, sender


def _create_journal(settings: Settings) -> Journal | None:
    for folder in settings.spools():
        try:
            return Journal.create(folder)
        except OSError as error:
            logger.warning("the spool folder %s cannot be written: %s", folder, error)
    logger.warning("nothing is tracked: there is no spool folder")
    return None


def _available(settings: Settings) -> bool:
    if not settings.uri or os.environ.get("RANK", "0") != "0":  # of distributed processes the first one tracks
        return False
    if importlib.util.find_spec("mlflow") is None:
        logger.warning("MLFLOW_TRACKING_URI is set and mlflow is not installed: nothing is tracked")
        return False
    configure_client()
    with importing():
        import mlflow  # noqa: F401 - here, so that its seconds do not count as waiting for the server

    return True


def _now() -> int:
    return time.time_ns() // 1_000_000
