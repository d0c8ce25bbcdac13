"""The train step through a TrainJob whose nodes really run, as processes that meet over gloo."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kubetuner.artifacts import ModelArtifact, read_artifact, verify_files
from kubetuner.config.trainjob import TrainJobSettings
from kubetuner.errors import ArtifactError, InputError
from kubetuner.steps.train import train
from kubetuner.training.interruption import TerminatedError
from kubetuner.trainjob import cluster as clusters
from kubetuner.trainjob import follow as following
from tests.servers.kubernetes import KubernetesServer, LocalNodes, pod_environment, tell_to_stop, wait_until
from tests.unit.steps.test_train import _caches, _local, _section  # noqa: F401 - the fixture is used by being here
from tests.unit.steps.test_train_processes import ALONE, _losses

TWO = {"num_train_processes": 1, "num_machines": 2, "gradient_accumulation_steps": 1}
SHARED = {"mixed_precision": "no", "adam_epsilon": 1e-4, "model_type": "lora", "lora": {"rank": 2, "alpha": 8.0}}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared volume, and everything else that the environment says of the cluster."""
    mount = tmp_path / "workspace"
    mount.mkdir()
    settings = TrainJobSettings(workspace_pvc="shared", mount=str(mount), image="train:1", gpus=0, grace_seconds=60)
    monkeypatch.setenv("KUBETUNER_TRAINJOB", settings.to_json())
    monkeypatch.setattr(following, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(following, "GRACE_SECONDS", 1.0)
    return mount


@pytest.fixture
def server(tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    with KubernetesServer(tmp_path) as started:
        monkeypatch.setattr(clusters, "SERVICE_ACCOUNT", started.account)
        for name, value in pod_environment(started).items():
            monkeypatch.setenv(name, value)
        nodes = LocalNodes(started, {name: os.environ[name] for name in os.environ if name != "KUBETUNER_TRAINJOB"})
        yield started
        for name in list(nodes.running):
            nodes._stop(name)


def test_two_machines_train_what_one_does(
    tmp_path: Path, server: KubernetesServer, workspace: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    caches = _caches(tmp_path, "sana")
    with monkeypatch.context() as without:
        without.delenv("KUBETUNER_TRAINJOB")
        alone = train(_section(tmp_path, "sana", **SHARED, **ALONE), *caches, tmp_path / "alone")
    server.fail("GET .*/log$", 0)

    artifact = train(_section(tmp_path, "sana", **SHARED, **TWO), *caches, tmp_path / "two")

    assert artifact == read_artifact(tmp_path / "two", ModelArtifact)
    verify_files(tmp_path / "two", artifact)
    assert (artifact.num_processes, artifact.fingerprint) == (2, alone.fingerprint)
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "alone"), rel=1e-4)
    assert "2 of 2 nodes run" in caplog.text
    assert caplog.text.count("Trained to step 3") == 2  # By the one, and by the first node, in the log that was cut.
    wait_until(lambda: not server.jobs)
    assert not list((workspace / "kubetuner").iterdir())
