"""The MLflow calls we make."""

import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kubetuner.tracking.journal import Entry

logger = logging.getLogger(__name__)

RUN_TAG = "kubetuner.run_id"
PARENT_TAG = "mlflow.parentRunId"
WAIT_SECONDS = 10.0
"""How long a step waits for a server, at its start and at its end."""
DATABASE_WAIT_SECONDS = 60.0
"""The same when the tracking URI is a database, which is first brought to MLflow's schema."""
SLOWEST_UPLOAD = 10e6
"""Bytes per second below which a model upload is given up."""
FILE_SECONDS = 30.0
"""How long one picture or text may take."""
MAX_PARAM_CHARACTERS = 6000
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_CLIENT_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    _TIMEOUT: "6",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def configure_client() -> None:
    """Make the client give up soon; its own defaults block a call for minutes. What the user set stays."""
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
    """``name`` in the characters that MLflow allows."""
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)


@dataclass(frozen=True)
class Settings:
    """Where to track to, from the environment."""

    uri: str
    experiment: str
    artifacts: str
    group: str
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
            run_id=env.get("MLFLOW_RUN_ID", ""),
        )

    @property
    def patience(self) -> float:
        """Seconds that a step waits for MLflow."""
        return WAIT_SECONDS if self.uri.startswith("http") else DATABASE_WAIT_SECONDS

    def spool(self) -> Path:
        """The folder of journals that belong together: same server, experiment and pipeline run."""
        root = os.environ.get("KUBETUNER_SPOOL", "")
        if not root:
            store = os.environ.get("KUBETUNER_STORE", "")
            root = f"{store}/spool" if store else f"{tempfile.gettempdir()}/kubetuner-spool-{os.getuid()}"
        server = hashlib.sha256(f"{self.uri}\n{self.experiment}".encode()).hexdigest()[:12]
        return Path(root) / server / (re.sub(r"[^\w.-]", "_", self.group or self.run_id) or "single")


class Server:
    """The MLflow calls we make; only ever used by one thread."""

    def __init__(self, settings: Settings) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=settings.uri)
        self._settings = settings

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

    def find_parent(self, experiment: str, group: str) -> str:
        """The group's oldest parent run, or empty."""
        found = self._client.search_runs(
            [experiment],
            filter_string=f"tags.`{RUN_TAG}` = '{group}' and tags.`kubetuner.role` = 'parent'",
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
            max_results=1,
        )
        return str(found[0].info.run_id) if found else ""

    def parent(self, experiment: str, group: str) -> str:
        """The group's parent run; of several steps that create it at once all keep the oldest."""
        if parent := self.find_parent(experiment, group):
            return parent
        tags = {RUN_TAG: group, "kubetuner.role": "parent"}
        own = str(self._client.create_run(experiment, tags=tags, run_name=group).info.run_id)
        time.sleep(0.5)  # a run with an older start time may become visible only now
        parent = self.find_parent(experiment, group) or own
        if parent != own:
            self._client.delete_run(own)
        return parent

    def create_run(self, start: Entry) -> str:
        """A run for a step, below its group's parent run; returns its id."""
        experiment = self.experiment()
        tags = {"kubetuner.step": start.key}
        if start.text:
            tags |= {RUN_TAG: start.text, PARENT_TAG: self.parent(experiment, start.text)}
        run = self._client.create_run(experiment, start_time=start.time, tags=tags, run_name=start.key)
        return str(run.info.run_id)

    def end_run(self, run_id: str, status: str, end_time: int) -> None:
        """Terminate a run."""
        self._client.set_terminated(run_id, status=status, end_time=end_time)

    def log_points(self, run_id: str, points: list[Entry]) -> None:
        """At most 1000 points in one call."""
        from mlflow.entities import Metric

        metrics = [Metric(_key(point.key), point.value, point.time, point.step) for point in points]
        self._client.log_batch(run_id, metrics=metrics, synchronous=True)

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Parameters under ``cfg/``: Kubeflow's plugin logs plain names, and a parameter cannot change its value."""
        from mlflow.entities import Param

        rows = [Param(f"cfg/{_key(key)}", value[:MAX_PARAM_CHARACTERS]) for key, value in sorted(params.items())]
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
                pixels = picture.copy()
        except OSError as error:
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
