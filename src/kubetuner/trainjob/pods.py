"""What the pods of a TrainJob say of themselves, in words."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from kubetuner.trainjob.manifest import NODE

Pod = Mapping[str, Any]
INDEX = "batch.kubernetes.io/job-completion-index"
# Kubernetes goes on trying these, and nothing but a person can help.
_HOPELESS = frozenset(
    {"ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError", "CreateContainerError"}
)


def index(pod: Pod) -> int:
    """Which node of the TrainJob it is, from 0."""
    return int(pod["metadata"].get("labels", {}).get(INDEX, 0))


def newest(pods: Sequence[Pod]) -> dict[int, Pod]:
    """The pod of each node, of those given the last one."""
    return {index(pod): pod for pod in pods}


def is_over(pod: Pod) -> bool:
    """Whether nothing of it runs any more, or will."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def is_running(pod: Pod) -> bool:
    """Whether its node has started, and maybe ended."""
    state = _container(pod).get("state", {})
    return "running" in state or "terminated" in state


def hopeless(pod: Pod) -> str:
    """Why it will never start; empty if it may."""
    waiting = _container(pod).get("state", {}).get("waiting", {})
    return f"{waiting['reason']}: {waiting.get('message', '')}" if waiting.get("reason") in _HOPELESS else ""


def waiting_for(pod: Pod) -> str:
    """Why it does not run yet; empty if it does."""
    if is_running(pod):
        return ""
    for condition in pod.get("status", {}).get("conditions", ()):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"{condition.get('reason', 'Unschedulable')}: {condition.get('message', '')}"
    waiting = _container(pod).get("state", {}).get("waiting", {})
    return ": ".join(filter(None, (waiting.get("reason", "Pending"), waiting.get("message", ""))))


def fall(pod: Pod) -> str:
    """How it ended badly, itself or its container before the last restart; empty if it has not."""
    status = pod.get("status", {})
    states = (_container(pod).get(name, {}).get("terminated") for name in ("state", "lastState"))
    for ended in states:
        if ended and ended.get("exitCode", 0) != 0:
            said = f": {ended['message']}" if ended.get("message") else ""
            return f"{ended.get('reason', 'Error')}, exit code {ended['exitCode']}{said}"
    if status.get("phase") == "Failed":
        return ": ".join(filter(None, (status.get("reason", "Failed"), status.get("message", ""))))
    return ""


def was_killed(pod: Pod) -> bool:
    """Whether it ended by the machine's or the cluster's doing, and not by an error of its own."""
    how = fall(pod)
    itself = how.startswith("Error, ") and not how.startswith("Error, exit code 137")
    return bool(how) and not itself


def seconds_since(stamp: str, now: datetime) -> float:
    """Seconds from a time of Kubernetes' (``2026-11-21T11:00:00Z``) to ``now``."""
    return (now - datetime.fromisoformat(stamp)).total_seconds()


def _container(pod: Pod) -> Mapping[str, Any]:
    found = pod.get("status", {}).get("containerStatuses", ())
    return next((one for one in found if one["name"] == NODE), {})
