"""Settings that Hugging Face's client reads when it is imported, and servers that take long to start."""

import os
import tempfile
from collections.abc import Iterator

import pytest

from tests.servers.mlflow_server import MlflowServer

os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="kubetuner-hf-"))


@pytest.fixture(scope="session")
def running_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow-server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def mlflow_server(running_mlflow: MlflowServer) -> MlflowServer:
    """A real MLflow server that answers, whatever the test before did to it."""
    running_mlflow.go_on()
    running_mlflow.start()
    return running_mlflow
