"""The TrainJob of a run, as ``trainer.kubeflow.org/v1alpha1`` has it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kubetuner.config.trainjob import TRAINJOB_VARIABLE, TrainJobSettings
from kubetuner.errors import InputError

API_VERSION = "trainer.kubeflow.org/v1alpha1"
REQUEST = "kubetuner.dev/request"
NODE_MODULE = "kubetuner.steps.train_node"
# Names that Trainer gives to the pods' job and to their container.
NODE = "node"
_MANAGER = "kubetuner.dev/train"

# What the step's environment says of where things are; the nodes must be told the same.
_PASSED_ON = (
    "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE",
    "KUBETUNER_MLFLOW_ARTIFACTS", "KUBETUNER_PROCESS_PATIENCE_MINUTES", "KUBETUNER_PROCESS_TIMEOUT_MINUTES",
    "KUBETUNER_RUN_ID", "KUBETUNER_RUN_NAME", "KUBETUNER_SPOOL", "KUBETUNER_STORE", "KUBETUNER_STORE_CACHE",
    "KUBETUNER_STORE_CACHE_GIB",
    "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_WORKSPACE",
)  # fmt: skip
_SECRET = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME")
_WITH_PASSWORD = re.compile(r"://[^/@\s]+:[^/@\s]+@")


def make_trainjob(
    name: str, request: str, words: Path, machines: int, processes: int, settings: TrainJobSettings
) -> dict[str, Any]:
    """The object to submit.

    Args:
        name: Its name, the same for every attempt of a run.
        request: What was asked for, as a digest: a TrainJob that is found running is this one only if it says the same.
        words: Folder on the shared volume that the nodes take their task from.
        machines: Nodes.
        processes: Of each node; 0 for one per GPU.
        settings: The cluster's.

    Raises:
        InputError: The environment holds a password where the TrainJob would show it.
    """
    trainer: dict[str, Any] = {
        "image": settings.image,
        "command": ["python3", "-m", NODE_MODULE],
        "args": [str(words)],
        "env": _environment(settings),
        "numNodes": machines,
        "resourcesPerNode": _resources(settings),
    }
    if processes:
        trainer["numProcPerNode"] = processes
    return {
        "apiVersion": API_VERSION,
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/managed-by": "kubetuner"} | settings.labels,
            "annotations": {REQUEST: request},
        },
        "spec": {
            "runtimeRef": {
                "apiGroup": API_VERSION.partition("/")[0],
                "kind": settings.runtime_kind,
                "name": settings.runtime,
            },
            "trainer": trainer,
            "runtimePatches": [{"manager": _MANAGER, "trainingRuntimeSpec": _patch(_pod(settings))}],
        },
    }


def left_behind(settings: TrainJobSettings, environment: Mapping[str, str]) -> list[str]:
    """Secrets that the step has and the nodes will not."""
    return [name for name in _SECRET if environment.get(name) and name not in settings.secrets]


def _environment(settings: TrainJobSettings) -> list[dict[str, Any]]:
    values = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)} | settings.env
    shown = [name for name, value in values.items() if _WITH_PASSWORD.search(value) and name not in settings.secrets]
    if shown:
        raise InputError(
            f"{', '.join(shown)} holds a password, which all who may see the TrainJob could read; put it in a Secret "
            f'and name that in {TRAINJOB_VARIABLE}: "secrets": {{"{shown[0]}": "SECRET/KEY"}}.'
        )
    plain = [{"name": name, "value": value} for name, value in values.items() if name not in settings.secrets]
    secret = [
        {"name": name, "valueFrom": {"secretKeyRef": dict(zip(("name", "key"), place.split("/"), strict=True))}}
        for name, place in settings.secrets.items()
    ]
    return plain + secret


def _resources(settings: TrainJobSettings) -> dict[str, dict[str, str]]:
    asked = {"cpu": settings.cpu, "memory": settings.memory}
    if settings.gpus:
        asked[settings.accelerator] = str(settings.gpus)
    asked = {name: amount for name, amount in asked.items() if amount}
    return {"requests": asked, "limits": {name: amount for name, amount in asked.items() if name != "cpu"}}


def _pod(settings: TrainJobSettings) -> dict[str, Any]:
    """What the runtime's pods get on top: the shared volume, and the wishes of the settings."""
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "containers": [
            {
                "name": NODE,
                "volumeMounts": [
                    {"name": "kubetuner-workspace", "mountPath": settings.mount},
                    {"name": "kubetuner-shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "kubetuner-workspace", "persistentVolumeClaim": {"claimName": settings.workspace_pvc}},
            {"name": "kubetuner-shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
        ],
    }
    if settings.tolerations:
        named = (one.model_dump() for one in settings.tolerations)
        pod["tolerations"] = [{key: value for key, value in one.items() if value} for one in named]
    if settings.node_selector:
        pod["nodeSelector"] = settings.node_selector
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    return pod


def _patch(pod: Mapping[str, Any]) -> dict[str, Any]:
    # A sidecar of the mesh would outlive training, and stand between the nodes.
    labels = {"sidecar.istio.io/inject": "false"}
    template = {"metadata": {"labels": labels}, "spec": pod}
    return {"template": {"spec": {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": template}}}]}}}
