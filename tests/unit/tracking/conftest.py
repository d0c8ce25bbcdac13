"""A local SQLite store, made once: MLflow needs seconds for its tables."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def untracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tracking settings, whatever the environment of the tests says; the client's settings are put back."""
    for name in [*os.environ, "RANK"]:
        if name.startswith(("MLFLOW_", "KUBETUNER_")) or name == "RANK":
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.fixture
def tracked(untracked: None, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tracking into an experiment of this test alone; returns its name."""
    name = f"experiment of {tmp_path.name}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    monkeypatch.setenv("KUBETUNER_MLFLOW_ARTIFACTS", str(tmp_path / "mlartifacts"))
    monkeypatch.setenv("KUBETUNER_SPOOL", str(tmp_path / "spool"))
    return name
