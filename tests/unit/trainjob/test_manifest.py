"""What is submitted, held against the fields of the CRD that the test's server knows."""

from pathlib import Path

import pytest

from kubetuner.config.trainjob import Toleration, TrainJobSettings, trainjob_settings
from kubetuner.errors import InputError
from kubetuner.trainjob.manifest import left_behind, make_trainjob
from tests.servers.trainjob_schema import problems

WORDS = Path("/workspace/kubetuner/x/words")
EVERYTHING = TrainJobSettings(
    workspace_pvc="shared", mount="/data", runtime="mine", runtime_kind="TrainingRuntime", image="train:1", gpus=4,
    cpu="8", memory="64Gi", tolerations=(Toleration(key="gpu", operator="Exists", effect="NoSchedule"),),
    node_selector={"pool": "a100"}, service_account="trainer", secrets={"HF_TOKEN": "hf/token"},
    env={"NCCL_SOCKET_IFNAME": "eth0"}, grace_seconds=120, labels={"kueue.x-k8s.io/queue-name": "research"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "KUBETUNER_STORE", "KUBETUNER_TRAINJOB", "HF_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("settings", [EVERYTHING, TrainJobSettings(workspace_pvc="shared", image="train:1", gpus=0)])
@pytest.mark.parametrize("processes", [0, 2])
def test_kubernetes_takes_it(settings: TrainJobSettings, processes: int) -> None:
    job = make_trainjob("kubetuner-0123", "asked", WORDS, 3, processes, settings)

    assert problems(job) == []
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer.get("numProcPerNode", 0)) == (3, processes)
    assert trainer["command"] + trainer["args"] == ["python3", "-m", "kubetuner.steps.train_node", str(WORDS)]


def test_everything_reaches_the_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBETUNER_STORE", "gs://bucket/store")
    monkeypatch.setenv("HF_TOKEN", "never shown")
    job = make_trainjob("kubetuner-0123", "asked", WORDS, 2, 4, EVERYTHING)

    trainer = job["spec"]["trainer"]
    assert trainer["env"] == [
        {"name": "KUBETUNER_STORE", "value": "gs://bucket/store"},
        {"name": "NCCL_SOCKET_IFNAME", "value": "eth0"},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
    ]
    assert trainer["resourcesPerNode"] == {
        "requests": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "4"},
        "limits": {"memory": "64Gi", "nvidia.com/gpu": "4"},
    }
    spec = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert (pod["nodeSelector"], pod["serviceAccountName"]) == ({"pool": "a100"}, "trainer")
    assert pod["terminationGracePeriodSeconds"] == 120
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {"/data", "/dev/shm"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "shared"}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert "never shown" not in str(job)


def test_no_password_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow/")
    with pytest.raises(
        InputError, match=r'MLFLOW_TRACKING_URI holds a password.*"secrets": {"MLFLOW_TRACKING_URI": '
    ) as e:
        make_trainjob("a", "b", WORDS, 2, 0, EVERYTHING)
    assert "me:secret" not in str(e.value)
    hidden = EVERYTHING.model_copy(update={"secrets": {"MLFLOW_TRACKING_URI": "mlflow/uri"}})
    assert "me:secret" not in str(make_trainjob("a", "b", WORDS, 2, 0, hidden))


def test_secrets_that_stay_behind_are_named() -> None:
    assert left_behind(EVERYTHING, {"HF_TOKEN": "x", "MLFLOW_TRACKING_TOKEN": "y"}) == ["MLFLOW_TRACKING_TOKEN"]


def test_the_environment_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trainjob_settings() is None
    monkeypatch.setenv("KUBETUNER_TRAINJOB", EVERYTHING.to_json())
    assert trainjob_settings() == EVERYTHING


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON as docs/several-gpus.md describes it: the whole: invalid JSON"),
        ("{}", "workspace_pvc: field required"),
        ('{"workspace_pvc": "a", "gpu": 1, "grace_seconds": 0}', r"grace_seconds: .*greater.*gpu: extra inputs"),
        ('{"workspace_pvc": "a", "secrets": {"A": "b"}}', r"secrets.A: string should match"),
    ],
)
def test_what_it_cannot_say(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv("KUBETUNER_TRAINJOB", text)
    with pytest.raises(InputError, match=message):
        trainjob_settings()


@pytest.mark.parametrize(
    ("store", "seen"),
    [("", True), ("gs://bucket/x", True), ("/data/store", True), ("/dataset/store", False), ("runs", False)],
)
def test_the_store_must_be_seen_by_all(monkeypatch: pytest.MonkeyPatch, store: str, seen: bool) -> None:
    monkeypatch.setenv("KUBETUNER_STORE", store)
    assert bool(EVERYTHING.unseen()) is not seen
