"""A cluster with Kubeflow Trainer whose pods do what a test says."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kubetuner.config.trainjob import TrainJobSettings
from kubetuner.training.interruption import StopRequest
from kubetuner.trainjob import cluster as clusters
from kubetuner.trainjob import follow as following
from kubetuner.trainjob.cluster import Cluster, Json
from kubetuner.trainjob.manifest import make_trainjob
from tests.servers.kubernetes import KubernetesServer, pod_environment

NAME = "kubetuner-0123"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    monkeypatch.setattr(following, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(following, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(clusters, "_PAUSE_SECONDS", (0.02, 0.05))
    with KubernetesServer(tmp_path) as started:
        monkeypatch.setattr(clusters, "SERVICE_ACCOUNT", started.account)
        for name, value in pod_environment(started).items():
            monkeypatch.setenv(name, value)
        yield started


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    with StopRequest() as entered:
        yield entered


@pytest.fixture
def cluster(server: KubernetesServer, stop: StopRequest) -> Cluster:
    return Cluster.of_this_pod("", stop)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    (tmp_path / "words").mkdir()
    return tmp_path / "words"


@pytest.fixture
def job(words: Path) -> Json:
    return make_trainjob(NAME, "asked", words, 2, 0, TrainJobSettings(workspace_pvc="shared", image="train:1", gpus=8))
