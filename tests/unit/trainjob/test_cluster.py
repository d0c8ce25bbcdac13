"""What the API server answers, and what a person reads of it."""

import time
from pathlib import Path

import pytest

from kubetuner.errors import InputError, TrainingError
from kubetuner.training.interruption import StopRequest, TerminatedError
from kubetuner.trainjob import cluster as clusters
from kubetuner.trainjob.cluster import Cluster, Json
from tests.servers.kubernetes import NAMESPACE, KubernetesServer, tell_to_stop
from tests.unit.trainjob.conftest import NAME


def test_a_trainjob_comes_and_goes(cluster: Cluster, server: KubernetesServer, job: Json) -> None:
    assert cluster.namespace == NAMESPACE
    assert cluster.find(NAME) is None
    assert cluster.create(job)
    assert not cluster.create(job)
    found = cluster.find(NAME)
    assert found is not None
    assert found["spec"] == job["spec"]
    cluster.delete(NAME)
    cluster.delete("no-such-job")
    assert (
        server.asked.count(f"DELETE /apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs/{NAME}") == 1
    )


@pytest.mark.parametrize(
    ("status", "times"), [(503, 3), (429, 1), (500, 2), (0, 2)], ids=["unavailable", "too many", "error", "cut"]
)
def test_what_passes_by_itself_is_asked_again(
    cluster: Cluster, server: KubernetesServer, job: Json, status: int, times: int
) -> None:
    server.fail("POST", status, times)
    # An answer that was cut may have been obeyed: then the next one finds it there.
    assert cluster.create(job) is (status != 0)
    assert NAME in server.jobs


def test_patience_ends(cluster: Cluster, server: KubernetesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "PATIENCE_SECONDS", 0.3)
    server.fail("GET", 503, 1000, "etcd is away")
    with pytest.raises(TrainingError, match=r"could not be used for 0.005 minutes \(GET .*503 etcd is away\).*goes on"):
        cluster.find(NAME)


def test_sigterm_ends_the_waiting_but_not_at_once_that_for_a_removal(
    cluster: Cluster, server: KubernetesServer, job: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.create(job)
    tell_to_stop()
    server.fail("GET", 503, 1)
    with pytest.raises(TerminatedError, match="stopped by SIGTERM while the Kubernetes API"):
        cluster.find(NAME)
    server.fail("DELETE", 503, 3)
    cluster.delete(NAME)
    assert server.asked[-1].startswith("DELETE")

    monkeypatch.setattr(clusters, "FAREWELL_SECONDS", 0.2)
    server.fail("DELETE", 503, 1000)
    started = time.monotonic()
    with pytest.raises(TerminatedError):
        cluster.delete(NAME)
    assert time.monotonic() - started < 10


def test_no_rights(cluster: Cluster, server: KubernetesServer) -> None:
    server.fail("events", 403, message='events is forbidden: User "x" cannot list resource "events"')
    with pytest.raises(
        InputError, match=rf"may not GET /api/v1.*cannot list.*Role in docs/several.*namespace {NAMESPACE}"
    ):
        cluster.check_rights()
    cluster.check_rights()


def test_a_token_is_read_each_time(cluster: Cluster, server: KubernetesServer) -> None:
    token = server.account / "token"
    valid = token.read_text()
    token.write_text("old")
    with pytest.raises(InputError, match="Unauthorized"):
        cluster.find(NAME)
    token.write_text(f"{valid}\n")
    assert cluster.find(NAME) is None


def test_no_trainer(cluster: Cluster, server: KubernetesServer, job: Json) -> None:
    server.installed = False
    for ask in (cluster.check_rights, lambda: cluster.create(job)):
        with pytest.raises(InputError, match=r"does not know trainer\.kubeflow\.org/v1alpha1: Kubeflow Trainer 2"):
            ask()


def test_what_the_cluster_does_not_take(cluster: Cluster, server: KubernetesServer, job: Json) -> None:
    server.runtimes = set()
    with pytest.raises(
        InputError, match=r'refused POST .* \(403\).*ClusterTrainingRuntime "torch-distributed" not found'
    ):
        cluster.create(job)
    job["spec"]["trainer"]["nodes"] = 2
    with pytest.raises(InputError, match=r"refused POST .* \(422\).*spec.trainer.nodes: unknown field"):
        cluster.create(job)


def test_a_strange_server_is_not_trusted(cluster: Cluster, server: KubernetesServer, tmp_path: Path) -> None:
    """The certificate of the folder decides, whatever the environment says."""
    other = tmp_path / "other"
    other.mkdir()
    with KubernetesServer(other) as strange:
        (server.account / "ca.crt").write_bytes((strange.account / "ca.crt").read_bytes())
        with pytest.MonkeyPatch.context() as patch, StopRequest() as stop:
            patch.setattr(clusters, "PATIENCE_SECONDS", 0.1)
            with pytest.raises(TrainingError, match="SSLError"):
                Cluster.of_this_pod("", stop).find(NAME)


def test_outside_of_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(InputError, match="only be made from inside a pod"):
        Cluster.of_this_pod("", StopRequest())
