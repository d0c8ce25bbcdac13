"""What Kubernetes takes as a TrainJob (``trainer.kubeflow.org/v1alpha1``), as far as we use it."""

import re
from typing import Any

RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
Json = dict[str, Any]

# Leaves are types; a list has one kind of item; "*" stands for any key; "!" before a name: it must be there.
_TEXTS = {"*": str}
_ENV = {
    "!name": str, "value": str,
    "valueFrom": {"secretKeyRef": {"name": str, "!key": str}},
}  # fmt: skip
_POD = {
    "containers": [{"!name": str, "env": [_ENV], "volumeMounts": [{"!name": str, "!mountPath": str}]}],
    "volumes": [
        {
            "!name": str,
            "persistentVolumeClaim": {"!claimName": str},
            "emptyDir": {"medium": str, "sizeLimit": str},
        }
    ],
    "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
    "nodeSelector": _TEXTS, "serviceAccountName": str, "terminationGracePeriodSeconds": int,
}  # fmt: skip
_META = {"labels": _TEXTS, "annotations": _TEXTS}
_JOB_SET = {"replicatedJobs": [{"!name": str, "template": {"spec": {"template": {"metadata": _META, "spec": _POD}}}}]}
SCHEMA: Json = {
    "!apiVersion": str, "!kind": str, "!metadata": _META | {"!name": str},
    "!spec": {
        "!runtimeRef": {"!name": str, "kind": str, "apiGroup": str},
        "trainer": {
            "image": str, "command": [str], "args": [str], "env": [_ENV], "numNodes": int, "numProcPerNode": int,
            "resourcesPerNode": {"requests": _TEXTS, "limits": _TEXTS},
        },
        "runtimePatches": [{"!manager": str, "trainingRuntimeSpec": {"template": {"spec": _JOB_SET}}}],
    },
}  # fmt: skip


def problems(job: Json) -> list[str]:
    """What Kubernetes and Trainer would not take."""
    wrong = list(_against(SCHEMA, job, ""))
    name = job.get("metadata", {}).get("name", "")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
        wrong.append(f"metadata.name {name!r} is no DNS label")
    if wrong:
        return wrong
    trainer = job["spec"]["trainer"]
    named = [one["name"] for one in trainer["env"]]
    wrong += [f"{one} is reserved" for one in sorted(RESERVED & set(named))]
    if len(set(named)) < len(named):
        wrong.append("duplicate env")
    for patch in job["spec"].get("runtimePatches", ()):
        for one in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            pod = one["template"]["spec"]["template"]["spec"]
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                if "env" in container:
                    wrong.append("must not have envs for the node container")
                missing = {mount["name"] for mount in container["volumeMounts"]} - volumes
                wrong += [f"no volume {volume}" for volume in sorted(missing)]
    return wrong


def _against(schema: object, value: object, where: str) -> list[str]:
    if isinstance(schema, type):
        fits = isinstance(value, schema) and not (schema is int and isinstance(value, bool))
        return [] if fits else [f"{where}: expected {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: expected a list"]
        return [found for index, one in enumerate(value) for found in _against(schema[0], one, f"{where}[{index}]")]
    assert isinstance(schema, dict)
    if not isinstance(value, dict):
        return [f"{where}: expected an object"]
    known = {name.removeprefix("!"): inner for name, inner in schema.items()}
    found = [f"{where}.{name}: missing" for name in schema if name.startswith("!") and name[1:] not in value]
    for name, one in value.items():
        inner = known.get(name, known.get("*"))
        found += [f"{where}.{name}: unknown field"] if inner is None else _against(inner, one, f"{where}.{name}")
    return found
