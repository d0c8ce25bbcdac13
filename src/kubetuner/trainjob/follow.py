"""A TrainJob from its submission to its end: what it prints, why it waits, and the one error that it ends with.

Everything is asked for again every few seconds. A watch of Kubernetes' would tell sooner, and must be opened anew when
it ends, expires or is cut; nothing here is in such a hurry.

One node that fails ends the whole: the others could only wait for it. The TrainJob is taken away then, the step fails,
and started again it goes on from the last checkpoint, as with one pod.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kubetuner.errors import KubetunerError, TrainingError
from kubetuner.training.distributed.failures import exit_codes, first_error, forget, known_error
from kubetuner.training.interruption import StopRequest, TerminatedError
from kubetuner.trainjob import pods as told
from kubetuner.trainjob.cluster import Cluster, Json
from kubetuner.trainjob.manifest import REQUEST

logger = logging.getLogger(__name__)

POLL_SECONDS = 3.0
# For the other nodes, and the file system between, to tell what they know of it.
GRACE_SECONDS = 10.0
_OVERLAP_SECONDS = 10


def submit(cluster: Cluster, job: Json, words: Path, stop: StopRequest) -> None:
    """Submit ``job``, unless the same is running already; another of its name is taken away first.

    Args:
        cluster: Where.
        job: A TrainJob.
        words: Where its nodes will tell of errors; those of earlier attempts are removed.
        stop: SIGTERM.

    Raises:
        TerminatedError: SIGTERM arrived meanwhile.
        InputError: The cluster refuses it.
    """
    name, request = job["metadata"]["name"], job["metadata"]["annotations"][REQUEST]
    where, said = f"TrainJob {cluster.namespace}/{name}", False
    while True:
        found = cluster.find(name)
        if found is None:
            if all(told.is_over(pod) for pod in cluster.pods(name)):
                forget(words)
                if cluster.create(job):
                    logger.info("%s was submitted: %d nodes", where, _nodes(job))
                    return
        elif not _is_going(found):
            if found["metadata"].get("annotations", {}).get(REQUEST) == request and not _end(found):
                logger.info("%s of this run is there already; following it", where)
                return
            cluster.delete(name)
        if not said:
            said = True
            logger.info("%s of an earlier attempt is going; its pods may be saving a checkpoint", where)
        if stop.wait(POLL_SECONDS):
            raise TerminatedError("stopped by SIGTERM before the TrainJob was submitted; run again to resume")


def follow(cluster: Cluster, job: Json, words: Path, start_minutes: float, stop: StopRequest) -> None:
    """Return when the TrainJob has ended well.

    Args:
        cluster: Where it is.
        job: As it was submitted.
        words: Where its nodes tell of errors.
        start_minutes: How long pods may wait for a machine.
        stop: On SIGTERM the TrainJob is deleted, so that its pods get it too and save a checkpoint.

    Raises:
        TerminatedError: SIGTERM arrived.
        TrainingError: It failed, cannot start, or is gone.
        KubetunerError: The first error that a node has told of.
    """
    name = job["metadata"]["name"]
    following = _Following(cluster, name, _nodes(job), words, start_minutes)
    while True:
        if stop.received:
            cluster.delete(name)
            raise TerminatedError("stopped by SIGTERM; the nodes are told to save a checkpoint. Run again to resume")
        found = cluster.find(name)
        if found is None or _is_going(found):
            raise TrainingError(f"TrainJob {cluster.namespace}/{name} was deleted by someone else; run again to resume")
        error = following.look(found)
        if error is None and _end(found) == "Complete":
            return
        if error is not None:
            cluster.delete(name)
            raise error
        stop.wait(POLL_SECONDS)


@dataclass
class _Following:
    """What has been seen and said of one TrainJob."""

    cluster: Cluster
    name: str
    nodes: int
    words: Path
    start_minutes: float
    log: "_Log" = field(init=False)
    said: str = ""
    fallen_at: float | None = None
    all_ran: bool = False

    def __post_init__(self) -> None:
        self.log = _Log(self.cluster)

    def look(self, job: Json) -> KubetunerError | None:
        """Show what is new; returns why it should end."""
        pods = told.newest(self.cluster.pods(self.name))
        if 0 in pods:
            self.log.show(pods[0])
        if error := known_error(self.words):
            return error
        if _end(job) == "Complete":
            return None
        if _end(job) == "Failed" or any(told.fall(pod) for pod in pods.values()):
            self.fallen_at = self.fallen_at or time.monotonic()
            if time.monotonic() - self.fallen_at >= GRACE_SECONDS:
                return self._cause(job, pods)
            return None
        return None if self.all_ran else self._starting(job, pods)

    def _starting(self, job: Json, pods: dict[int, Any]) -> KubetunerError | None:
        """Say how far it is; why it will not start."""
        running = sum(told.is_running(pod) for pod in pods.values())
        self.all_ran = running == self.nodes
        waits = {number: told.waiting_for(pod) for number, pod in sorted(pods.items())}
        reasons = [f"node {number}: {why}" for number, why in waits.items() if why]
        suspended = _condition(job, "Suspended")
        if suspended:
            reasons.append(f"suspended: {suspended.get('message', '')}")
        elif not self.all_ran:
            reasons += self.cluster.warnings(self.name)
        said = f"{running} of {self.nodes} nodes run" + "".join(f"\n  {reason}" for reason in reasons)
        if said != self.said:
            self.said = said
            logger.info("TrainJob %s: %s", self.name, said)
        never = {number: told.hopeless(pod) for number, pod in sorted(pods.items())}
        if any(never.values()):
            listed = "; ".join(f"node {number}: {why}" for number, why in never.items() if why)
            return TrainingError(f"TrainJob {self.name} cannot start: {listed}")
        since = min((pod["metadata"]["creationTimestamp"] for pod in pods.values()), default=_created(job))
        waited = 0.0 if suspended or self.all_ran else told.seconds_since(since, datetime.now(UTC))
        if waited < 60 * self.start_minutes:
            return None
        why = "\n  ".join(reasons) or "there are no pods; does the controller of Kubeflow Trainer run?"
        return TrainingError(
            f"TrainJob {self.name} has not started after {self.start_minutes:g} minutes (start_minutes of "
            f"KUBETUNER_TRAINJOB): {running} of {self.nodes} nodes run\n  {why}"
        )

    def _cause(self, job: Json, pods: dict[int, Any]) -> KubetunerError:
        """Why it failed: what was done to a pod, or else what a process has left, or else what Kubernetes says."""
        for number, pod in sorted(pods.items()):
            if told.was_killed(pod):
                how = told.fall(pod)
                hint = '; give it more by "memory" of KUBETUNER_TRAINJOB' if how.startswith("OOMKilled") else ""
                return TrainingError(f"node {number} of {self.nodes} was ended: {how}{hint}; run again to resume")
        codes, count = exit_codes(self.words)
        if codes:
            return first_error(self.words, codes, count, stopped=False)
        fallen = [f"node {number}: {told.fall(pod)}" for number, pod in pods.items() if told.fall(pod)]
        message = (_condition(job, "Failed") or {}).get("message", "")
        reasons = [*fallen, *filter(None, [message]), *self.cluster.warnings(self.name)]
        return TrainingError(f"TrainJob {self.name} failed: {'; '.join(reasons) or 'it does not say why'}")


class _Log:
    """What the first node prints, shown as it comes; nothing twice, whatever is cut or restarted."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._last, self._asked = cluster, "", 0.0

    def show(self, pod: told.Pod) -> None:
        if not told.is_running(pod):
            return
        now = time.monotonic()
        seconds = int(now - self._asked) + _OVERLAP_SECONDS if self._asked else None
        lines = self._cluster.log(pod["metadata"]["name"], seconds)
        self._asked = now
        for line in lines:
            stamp, _, text = line.partition(" ")
            if (moment := _moment(stamp)) > self._last:
                self._last = moment
                logger.info("%s", text)


def _moment(stamp: str) -> str:
    """A time with nanoseconds in a form that sorts: Kubernetes leaves the last zeros out."""
    whole, _, fraction = stamp.removesuffix("Z").partition(".")
    return f"{whole}.{fraction:0<9}"


def _condition(job: Json, kind: str) -> Json | None:
    found: Sequence[Json] = job.get("status", {}).get("conditions", ())
    return next((one for one in found if one["type"] == kind and one["status"] == "True"), None)


def _end(job: Json) -> str:
    """``Complete`` or ``Failed``; empty while it goes on."""
    return next((kind for kind in ("Complete", "Failed") if _condition(job, kind)), "")


def _is_going(job: Json) -> bool:
    return "deletionTimestamp" in job["metadata"]


def _created(job: Json) -> str:
    return str(job["metadata"]["creationTimestamp"])


def _nodes(job: Json) -> int:
    return int(job["spec"]["trainer"]["numNodes"])
