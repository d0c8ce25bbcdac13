"""The MLflow calls we make."""

import fcntl
import hashlib
import logging
import os
import posixpath
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kubetuner.tracking.journal import Entry

logger = logging.getLogger(__name__)

RUN_TAG = "kubetuner.run_id"
ROLE_TAG = "kubetuner.role"
STEP_TAG = "kubetuner.step"
JOURNAL_TAG = "kubetuner.journal"
ERROR_TAG = "kubetuner.error"
PARENT_TAG = "mlflow.parentRunId"
WAIT_SECONDS = 10.0
"""How long a step waits for a server, at its start and at its end."""
DATABASE_WAIT_SECONDS = 60.0
"""The same when the tracking URI is a database, which is first brought to MLflow's schema."""
SLOWEST_UPLOAD = 10e6
"""Bytes per second below which a model upload is given up."""
FILE_SECONDS = 30.0
"""How long one picture or text may take."""
MAX_KEY_CHARACTERS = 250
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 5000
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_CLIENT_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # which may hold a password
    _TIMEOUT: "6",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def configure_client() -> None:
    """Make the client quiet and give up soon; its own defaults block a call for minutes. What the user set stays."""
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)


def upload_seconds(folder: Path) -> float:
    """How long uploading ``folder`` may take."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return 30.0 + size / SLOWEST_UPLOAD


class _Timeout:
    """The client reads its timeout from the environment at every call, so threads share it: the longest holds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: list[int] = []
        self._usual = ""

    @contextmanager
    def __call__(self, seconds: float) -> Iterator[None]:
        """Let single requests take ``seconds``: a server answers an upload only when it has stored it."""
        with self._lock:
            if not self._asked:
                self._usual = os.environ.get(_TIMEOUT, _CLIENT_SETTINGS[_TIMEOUT])
            self._asked.append(int(seconds))
            self._apply()
        try:
            yield
        finally:
            with self._lock:
                self._asked.remove(int(seconds))
                self._apply()

    def _apply(self) -> None:
        os.environ[_TIMEOUT] = str(max(self._asked)) if self._asked else self._usual


request_timeout = _Timeout()


def _key(name: str) -> str:
    """``name`` as MLflow allows it: few characters, not too long, and the plain form of a relative path."""
    plain = re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)[:MAX_KEY_CHARACTERS]
    return posixpath.normpath(plain).lstrip("./") or "_"


@dataclass(frozen=True)
class Settings:
    """Where to track to, from the environment."""

    uri: str
    experiment: str
    artifacts: str
    group: str
    group_name: str
    run_id: str

    @classmethod
    def from_environment(cls) -> Self:
        """Read the variables that the package documents."""
        env = os.environ
        return cls(
            uri=env.get("MLFLOW_TRACKING_URI", ""),
            experiment=env.get("MLFLOW_EXPERIMENT_NAME", "") or "kubetuner",
            artifacts=env.get("KUBETUNER_MLFLOW_ARTIFACTS", ""),
            group=env.get("KUBETUNER_RUN_ID", "").replace("'", ""),
            group_name=env.get("KUBETUNER_RUN_NAME", ""),
            run_id=env.get("MLFLOW_RUN_ID", ""),
        )

    @property
    def patience(self) -> float:
        """Seconds that a step waits for MLflow."""
        return WAIT_SECONDS if self.uri.startswith("http") else DATABASE_WAIT_SECONDS

    def spools(self) -> tuple[Path, Path]:
        """Folders of the journals for this server and experiment: the usual one, and one for when that is read-only."""
        server = hashlib.sha256(f"{self.uri}\n{self.experiment}".encode()).hexdigest()[:12]
        temporary = f"{tempfile.gettempdir()}/kubetuner-spool-{os.getuid()}"
        store = os.environ.get("KUBETUNER_STORE", "")
        beside = f"{store}/spool" if store and "://" not in store else temporary
        root = os.environ.get("KUBETUNER_SPOOL", "") or beside
        return Path(root) / server, Path(temporary) / server

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep out other processes with the same spool; where no spool folder can be locked, keep out none."""
        with ExitStack() as stack:
            for folder in self.spools():
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    stream = stack.enter_context((folder / ".lock").open("w"))
                    fcntl.flock(stream, fcntl.LOCK_EX)
                    break
                except OSError:
                    continue
            yield


def _parent_mark(group: str) -> dict[str, str]:
    return {RUN_TAG: group, ROLE_TAG: "parent"}


class Server:
    """The MLflow calls we make; only ever used by one thread."""

    def __init__(self, settings: Settings) -> None:
        from mlflow import MlflowClient

        self._settings = settings
        if settings.uri.startswith("http"):
            self._client = MlflowClient(tracking_uri=settings.uri)
        else:
            with settings.alone():  # two that make a database's tables at once break it
                self._client = MlflowClient(tracking_uri=settings.uri)

    def experiment(self) -> str:
        """Id of the experiment, created when missing."""
        from mlflow.exceptions import MlflowException

        name, artifacts = self._settings.experiment, self._settings.artifacts
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                location = Path(artifacts).resolve().as_uri() if artifacts else None
                return str(self._client.create_experiment(name, artifact_location=location))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)  # another step created it meanwhile
                if found is None:
                    raise
        return str(found.experiment_id)

    def create_run(self, start: Entry, journal: str) -> str:
        """A run for a step, below its group's parent run; returns its id. ``journal`` tells it from all others."""
        experiment = self.experiment()
        mark = {JOURNAL_TAG: journal, STEP_TAG: start.key}
        if not start.text:
            return self._only_run(experiment, mark, mark, start.key, start.time)
        parent = self._parent(experiment, start, journal)
        return self._only_run(experiment, mark, mark | {RUN_TAG: start.text, PARENT_TAG: parent}, start.key, start.time)

    def end_run(self, run_id: str, end: Entry) -> None:
        """Terminate a run; what went wrong becomes a tag."""
        if end.note:
            self._client.set_tag(run_id, ERROR_TAG, end.note[:MAX_TAG_CHARACTERS])
        self._client.set_terminated(run_id, status=end.status, end_time=end.time)

    def finish_group(self, finish: Entry, journal: str) -> None:
        """Terminate the group's parent run, and as FAILED the children that are still running: their steps are gone.

        Of several parents the oldest gets all children.
        """
        experiment = self.experiment()
        parent = self._parent(experiment, finish, journal)
        for other in self._search(experiment, _parent_mark(finish.text))[1:]:  # made at once without a common spool
            for run in self._search(experiment, {PARENT_TAG: other}):
                self._client.set_tag(run, PARENT_TAG, parent)
            self._client.delete_run(other)
        for run in self._search(experiment, {PARENT_TAG: parent}, " and attributes.status = 'RUNNING'"):
            self._client.set_terminated(run, status="FAILED", end_time=finish.time)
        self._client.set_terminated(parent, status=finish.status, end_time=finish.time)

    def _parent(self, experiment: str, entry: Entry, journal: str) -> str:
        """The parent run of the entry's group."""
        mark = _parent_mark(entry.text)
        tags = mark | {JOURNAL_TAG: journal}
        with self._settings.alone():
            return self._only_run(experiment, mark, tags, entry.note or entry.text, entry.time, settle=0.5)

    def _only_run(
        self,
        experiment: str,
        mark: Mapping[str, str],
        tags: Mapping[str, str],
        name: str,
        start_time: int,
        settle: float = 0.0,
    ) -> str:
        """The oldest run with the tags ``mark``, created when missing.

        Several are created when two steps start at once, and when a request timed out that was carried out. All keep
        the oldest and delete what they made besides. One that is older may become visible only after ours, the later
        the slower the server is, so the choice waits ``settle`` seconds and as long as the server needed.
        """
        found = self._search(experiment, mark)
        if not found:
            asked = time.monotonic()
            own = self._client.create_run(experiment, start_time=start_time, tags=dict(tags), run_name=name)
            if settle:
                time.sleep(settle + 2 * (time.monotonic() - asked))
            found = self._search(experiment, mark) or [str(own.info.run_id)]
        for run in self._search(experiment, tags):
            if run != found[0]:
                self._client.delete_run(run)
        return found[0]

    def _search(self, experiment: str, tags: Mapping[str, str], more: str = "") -> list[str]:
        """Ids of the runs with ``tags``, the oldest first."""
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        found = self._client.search_runs([experiment], filter_string=wanted + more, order_by=order)
        return [str(run.info.run_id) for run in found]

    def log_points(self, run_id: str, points: list[Entry]) -> None:
        """At most 1000 points in one call."""
        from mlflow.entities import Metric

        metrics = [Metric(_key(point.key), point.value, point.time, point.step) for point in points]
        self._client.log_batch(run_id, metrics=metrics, synchronous=True)

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Parameters under ``cfg/``: Kubeflow's plugin logs plain names, and a parameter cannot change its value."""
        from mlflow.entities import Param

        rows = [Param(_key(f"cfg/{key}"), value[:MAX_PARAM_CHARACTERS]) for key, value in sorted(params.items())]
        for first in range(0, len(rows), 100):
            self._client.log_batch(run_id, params=rows[first : first + 100], synchronous=True)

    def log_text(self, run_id: str, entry: Entry) -> None:
        """A text artifact."""
        with request_timeout(FILE_SECONDS):
            self._client.log_text(run_id, entry.text, entry.key)

    def log_image(self, run_id: str, entry: Entry) -> None:
        """A picture; one that is gone is skipped: a replay may run on another machine than the step that drew it."""
        from PIL import Image

        try:
            with Image.open(entry.text) as picture:
                pixels = picture.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's for broken files
            logger.warning("picture %s is not logged: %s", entry.key, error)
            return
        with request_timeout(FILE_SECONDS):
            self._client.log_image(
                run_id, pixels, key=_key(entry.key), step=entry.step, timestamp=entry.time, synchronous=True
            )

    def log_model(self, run_id: str, folder: Path, name: str) -> str:
        """Upload ``folder`` as a logged model of the run; returns its URI."""
        experiment = self._client.get_run(run_id).info.experiment_id
        model = self._client.create_logged_model(experiment, name=name, source_run_id=run_id)
        with request_timeout(upload_seconds(folder)):
            self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        return f"models:/{model.model_id}"

    def fetch(self, uri: str, out: Path) -> Path:
        """Download a logged model."""
        from mlflow.artifacts import download_artifacts

        self._client.get_logged_model(uri.removeprefix("models:/"))  # a server that hangs is noticed here, and soon
        with request_timeout(600.0):
            return Path(download_artifacts(artifact_uri=uri, dst_path=str(out), tracking_uri=self._settings.uri))
