"""The few questions that training on several machines asks of Kubernetes, over plain HTTPS from inside a pod.

Every pod has the address of the API server in its environment and a token beside a certificate in a folder. Answers are
Kubernetes' own JSON. What passes by itself (503, 429, a cut connection) is asked again for :data:`PATIENCE_SECONDS`.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kubetuner.config.trainjob import GUIDE, TRAINJOB_VARIABLE
from kubetuner.errors import InputError, TrainingError
from kubetuner.training.interruption import StopRequest, TerminatedError
from kubetuner.trainjob.manifest import API_VERSION, NODE

if TYPE_CHECKING:
    from requests import Response

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PATIENCE_SECONDS = 600.0
# Of those that a pod has after SIGTERM, to take the TrainJob away.
FAREWELL_SECONDS = 20.0
_PAUSE_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
_TIMEOUT = (10.0, 60.0)
_FIRST_LINES = 1000

Json = dict[str, Any]


class Cluster:
    """One namespace, as the pod's service account sees it.

    Every method raises ``InputError`` for what the cluster refuses (no rights, no Trainer, an object that it does not
    take) and ``TrainingError`` when it cannot be reached; ``TerminatedError`` when SIGTERM arrives while it waits.
    """

    def __init__(self, url: str, namespace: str, account: Path, stop: StopRequest) -> None:
        import requests

        self.namespace, self._url, self._account, self._stop = namespace, url, account, stop
        self._session = requests.Session()
        self._session.trust_env = False  # The proxy for the world outside is not for the cluster itself.
        self._session.verify = str(account / "ca.crt")

    @classmethod
    def of_this_pod(cls, namespace: str, stop: StopRequest) -> "Cluster":
        """The cluster that this pod is in; its own namespace if ``namespace`` is empty.

        Raises:
            InputError: This is no pod, or it has no service account.
        """
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{part}", "") for part in ("HOST", "PORT"))
        if not host or not (SERVICE_ACCOUNT / "token").is_file():
            raise InputError(
                "a TrainJob can only be made from inside a pod with a service account: KUBERNETES_SERVICE_HOST and "
                f"{SERVICE_ACCOUNT}/token say where it is, and one is missing. Unset {TRAINJOB_VARIABLE} to train here."
            )
        address = f"[{host}]" if ":" in host else host
        own = (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        return cls(f"https://{address}:{port}", namespace or own, SERVICE_ACCOUNT, stop)

    def find(self, name: str) -> Json | None:
        """The TrainJob called ``name``, if there is one."""
        return self._json("GET", f"{self._jobs}/{name}")

    def create(self, job: Json) -> bool:
        """Submit; false if there is one of that name already."""
        # Without it, a Trainer that is too old would drop what it does not know, such as the volume.
        return self._json("POST", self._jobs, {"fieldValidation": "Strict"}, job) is not None

    def delete(self, name: str) -> None:
        """Take the TrainJob away, and its pods before it; none is no error."""
        self._json("DELETE", f"{self._jobs}/{name}", body={"propagationPolicy": "Foreground"})

    def pods(self, name: str) -> list[Json]:
        """Its nodes' pods, those of earlier attempts too, the oldest first."""
        labels = f"jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/replicatedjob-name={NODE}"
        found = self._json("GET", f"{self._core}/pods", {"labelSelector": labels}) or {}
        return sorted(found.get("items", ()), key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def warnings(self, name: str) -> list[str]:
        """The latest warning about each thing that belongs to the TrainJob, in words."""
        found = self._json("GET", f"{self._core}/events", {"fieldSelector": "type=Warning"}) or {}
        said: dict[str, str] = {}
        for event in found.get("items", ()):
            about = event["involvedObject"].get("name", "")
            if about == name or about.startswith(f"{name}-"):
                said[about] = f"{about}: {event.get('reason', '')}: {event.get('message', '')}"
        return list(said.values())

    def log(self, pod: str, seconds: int | None) -> list[str]:
        """Lines of the pod's node, each after its time and a space: of the last ``seconds``, or the last thousand."""
        span = {"tailLines": _FIRST_LINES} if seconds is None else {"sinceSeconds": seconds}
        query = {"container": NODE, "timestamps": "true"} | span
        answer = self._ask("GET", f"{self._core}/pods/{pod}/log", query, quiet=(400, 404))
        if answer.status_code != 200:  # Gone, or not started.
            return []
        return answer.content.decode("utf-8", errors="replace").splitlines()

    def check_rights(self) -> None:
        """Ask everything once that reads, so that a right which is missing is found before anything is started."""
        self.find("kubetuner")
        self.pods("kubetuner")
        self.warnings("kubetuner")
        self.log("kubetuner", None)

    @property
    def _jobs(self) -> str:
        return f"/apis/{API_VERSION}/namespaces/{self.namespace}/trainjobs"

    @property
    def _core(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}"

    def _json(
        self, method: str, path: str, query: Mapping[str, object] | None = None, body: Json | None = None
    ) -> Json | None:
        """The object in the answer; ``None`` where it is not there (404), or was there before (409)."""
        quiet = (409,) if method == "POST" else (404,)
        answer = self._ask(method, path, query, body, quiet)
        return None if answer.status_code in quiet else answer.json()

    def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, object] | None = None,
        body: Json | None = None,
        quiet: tuple[int, ...] = (),
    ) -> "Response":
        """The answer, if it is good or its code is in ``quiet``."""
        from requests.exceptions import RequestException

        asked, pauses = time.monotonic(), iter(_PAUSE_SECONDS)
        while True:
            try:
                answer = self._send(method, path, query, body)
                reason = f"{answer.status_code} {_status(answer).get('message') or answer.text[:200]}"
                unknown = answer.status_code == 404 and not _status(answer)  # The path itself, and not what it names.
                if answer.ok or (answer.status_code in quiet and not unknown):
                    return answer
                if answer.status_code != 429 and answer.status_code < 500:
                    raise self._refused(method, path, answer)
            except RequestException as error:
                reason = f"{type(error).__name__}: {error}"
            self._pause(
                method, f"{method} {path}: {reason}", time.monotonic() - asked, next(pauses, _PAUSE_SECONDS[-1])
            )

    def _pause(self, method: str, reason: str, tried: float, seconds: float) -> None:
        """Wait before asking again; a TrainJob is taken away even after SIGTERM."""
        removing = method == "DELETE"
        stopped = self._stop.received if removing else self._stop.wait(seconds)
        if stopped and not (removing and tried < FAREWELL_SECONDS):
            raise TerminatedError(
                f"stopped by SIGTERM while the Kubernetes API could not be used ({reason}); run again to resume"
            )
        if tried > PATIENCE_SECONDS:
            raise TrainingError(
                f"the Kubernetes API could not be used for {PATIENCE_SECONDS / 60:g} minutes ({reason}); a TrainJob "
                "that runs goes on, and running again finds it"
            )
        if removing:
            time.sleep(seconds)

    def _send(self, method: str, path: str, query: Mapping[str, object] | None, body: Json | None) -> "Response":
        token = (self._account / "token").read_text(encoding="utf-8").strip()  # It is renewed every hour.
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body)
        params = {name: str(value) for name, value in (query or {}).items()}
        return self._session.request(
            method, self._url + path, params=params, data=data, headers=headers, timeout=_TIMEOUT
        )

    def _refused(self, method: str, path: str, answer: "Response") -> InputError:
        message = _status(answer).get("message") or answer.text[:500]
        if answer.status_code in (401, 403) and "denied the request" not in message:
            return InputError(
                f"the service account of the train step may not {method} {path}: {message}. It needs the Role in "
                f"{GUIDE}, bound in the namespace {self.namespace}."
            )
        if answer.status_code == 404 and not _status(answer):
            return InputError(
                f"the cluster does not know {API_VERSION}: Kubeflow Trainer 2 is not installed in it. Install it "
                f"({GUIDE}), or set num_machines to 1 and compile without {TRAINJOB_VARIABLE}."
            )
        return InputError(f"the cluster refused {method} {path} ({answer.status_code}): {message}")


def _status(answer: "Response") -> Json:
    """Kubernetes' own account of an error; empty if the answer is none."""
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.get("kind") == "Status" else {}
