"""Where several machines train: what ``KUBETUNER_TRAINJOB`` says, as JSON.

It describes a cluster and not a run, so it is no part of ``config.json`` and changes no cache key.
"""

import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from kubetuner.config.sections.base import Section
from kubetuner.errors import InputError

TRAINJOB_VARIABLE = "KUBETUNER_TRAINJOB"
GUIDE = "docs/several-gpus.md"

_Text = Annotated[str, Field(min_length=1)]


class Toleration(Section):
    """A toleration of a pod, with Kubernetes' names."""

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""


class TrainJobSettings(Section):
    """What a ``TrainJob`` needs to know of the cluster.

    Attributes:
        workspace_pvc: Name of a claim that many pods can write to (``ReadWriteMany``): inputs, checkpoints and the
            model travel through it. The train step has it mounted too.
        mount: Where all of them mount it.
        runtime: A training runtime whose machine is PyTorch's, with a replicated job and a container called ``node``.
        runtime_kind: Whether every namespace sees it.
        namespace: Of the TrainJob; empty for the step's own.
        image: Image of the nodes; empty at compilation for that of the train step.
        gpus: GPUs of a node; 0 to train on CPUs. ``None`` at compilation for ``KUBETUNER_GPUS``.
        accelerator: The resource that a GPU is.
        cpu: CPUs of a node, such as ``"8"``; empty to ask for none.
        memory: Memory of a node, such as ``"64Gi"``; empty to ask for none.
        shared_memory: Size of ``/dev/shm``, through which NCCL and loaders talk; it counts as memory.
        tolerations: Taints that the nodes' pods put up with.
        node_selector: Labels that machines must have.
        service_account: Of the nodes' pods; empty for the namespace's default.
        labels: Of the TrainJob, such as ``kueue.x-k8s.io/queue-name``.
        secrets: Environment variables from Secrets: ``{"HF_TOKEN": "hf/token"}`` takes the key ``token`` of the Secret
            ``hf``.
        env: Further environment variables, such as ``NCCL_SOCKET_IFNAME``.
        grace_seconds: How long a pod that is told to stop may take to save a checkpoint.
        start_minutes: How long pods may wait for a machine before the step gives up.
    """

    workspace_pvc: _Text
    mount: str = "/workspace"
    runtime: _Text = "torch-distributed"
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    namespace: str = ""
    image: str = ""
    gpus: int | None = Field(default=None, ge=0)
    accelerator: _Text = "nvidia.com/gpu"
    cpu: str = ""
    memory: str = ""
    shared_memory: _Text = "8Gi"
    tolerations: tuple[Toleration, ...] = ()
    node_selector: dict[str, str] = Field(default_factory=dict)
    service_account: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    secrets: dict[str, Annotated[str, Field(pattern=r"^[^/]+/[^/]+$")]] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)
    grace_seconds: int = Field(default=300, ge=1)
    start_minutes: float = Field(default=60.0, gt=0)

    def unseen(self) -> list[str]:
        """What is wrong with the places that the environment names: the nodes see buckets and the shared volume."""
        store = os.environ.get("KUBETUNER_STORE", "")
        if not store or "://" in store or Path(store).absolute().is_relative_to(PurePosixPath(self.mount)):
            return []
        return [f"KUBETUNER_STORE is {store!r}, which other pods do not see; use gs:// or a folder below {self.mount}"]


def no_trainjob(machines: int) -> str:
    """What is missing for ``num_machines`` of more than one."""
    return (
        f"num_machines is {machines}, and {TRAINJOB_VARIABLE} does not say how to reach so many: they train in a "
        f"TrainJob of Kubeflow Trainer and share a volume ({GUIDE}). Set it when the pipeline is compiled. On a single "
        "machine, set num_machines to 1; num_train_processes is for its GPUs."
    )


def trainjob_settings() -> TrainJobSettings | None:
    """What the environment says; ``None`` where training is to stay in this pod.

    Raises:
        InputError: It is not what it should be: lists every problem.
    """
    text = os.environ.get(TRAINJOB_VARIABLE, "")
    if not text:
        return None
    try:
        return TrainJobSettings.model_validate_json(text)
    except ValidationError as error:
        listed = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'the whole'}: {one['msg'][:1].lower()}{one['msg'][1:]}"
            for one in error.errors()
        )
        raise InputError(f"{TRAINJOB_VARIABLE} is not JSON as {GUIDE} describes it: {listed}.") from error
