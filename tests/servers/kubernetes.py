"""A Kubernetes API server with Kubeflow Trainer, as far as a TrainJob's submitter sees one: HTTPS, tokens, its JSON.

What is submitted is held against the fields of ``trainer.kubeflow.org/v1alpha1`` that we use; an unknown one, or one of
the wrong type, is refused as the API server refuses it.
"""

import json
import os
import re
import signal
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.servers.trainjob_schema import problems

NAMESPACE, TOKEN = "team", "the-token"
JOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
CORE = f"/api/v1/namespaces/{NAMESPACE}"
Json = dict[str, Any]


@dataclass
class Fault:
    """What becomes of the next ``times`` requests whose "METHOD path" matches: a status, or 0 for a cut answer."""

    pattern: str
    status: int
    times: int = 1
    message: str = "injected"


class KubernetesServer:
    """Serves until the ``with`` block ends.

    Attributes:
        jobs: TrainJobs by name.
        pods: Pods, in the order of their creation.
        events: Events.
        logs: Lines by pod, each with its time.
        asked: "METHOD path" of every request.
        faults: What goes wrong on purpose.
        installed: Whether Kubeflow Trainer is.
        runtimes: ClusterTrainingRuntimes there are.
        when_created: Called with a new TrainJob.
        when_deleted: Called with the name of a TrainJob that is to go; it is gone when this returns.
    """

    def __init__(self, folder: Path) -> None:
        self.jobs: dict[str, Json] = {}
        self.pods: list[Json] = []
        self.events: list[Json] = []
        self.logs: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.faults: list[Fault] = []
        self.installed, self.runtimes = True, {"torch-distributed"}
        self.when_created: Callable[[Json], object] = lambda _job: None
        self.when_deleted: Callable[[str], object] = lambda _name: None
        self.lock = threading.RLock()
        self.account = folder / "serviceaccount"
        self.account.mkdir()
        key = _certificate(self.account / "ca.crt", folder / "key.pem")
        (self.account / "token").write_text(TOKEN)
        (self.account / "namespace").write_text(NAMESPACE)
        server = self

        class Handler(_Handler):
            state = server

        self._http = _QuietServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.account / "ca.crt", key)
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.port = self._http.server_address[1]

    def __enter__(self) -> "KubernetesServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, pattern: str, status: int, times: int = 1, message: str = "injected") -> None:
        self.faults.append(Fault(pattern, status, times, message))

    def add_pod(self, job: str, node: int, container: Json | None = None, **status: object) -> Json:
        """A pod of a TrainJob's node, with the state of its container (``{"state": {"running": {}}}``)."""
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(node),
        }
        with self.lock:
            name = f"{job}-node-0-{node}-{len(self.pods)}"
            pod: Json = {
                "metadata": {"name": name, "labels": labels, "creationTimestamp": now()},
                "status": dict(status),
            }
            if container is not None:
                pod["status"]["containerStatuses"] = [{"name": "sidecar"}, {"name": "node"} | container]
            self.pods.append(pod)
            self.logs[name] = []
            return pod

    def print(self, pod: str, text: str) -> None:
        """The pod's node prints a line."""
        with self.lock:
            stamp = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}".rstrip("0")
            self.logs[pod].append(f"{stamp}Z {text}")

    def warn(self, about: str, reason: str, message: str) -> None:
        event = {"involvedObject": {"name": about}, "type": "Warning", "reason": reason, "message": message}
        self.events.append(event)

    def end(self, job: str, condition: str, message: str = "") -> None:
        """The TrainJob becomes Complete, Failed or Suspended."""
        with self.lock:
            self.jobs[job].setdefault("status", {})["conditions"] = [
                {"type": condition, "status": "True", "reason": "Because", "message": message}
            ]

    def create(self, job: Json) -> tuple[int, Json]:
        """The answer to a POST."""
        name = job.get("metadata", {}).get("name", "")
        wrong = problems(job)
        if wrong:
            return 422, _error(422, "Invalid", f'TrainJob "{name}" is invalid: {"; ".join(wrong)}')
        runtime = job["spec"]["runtimeRef"]["name"]
        if runtime not in self.runtimes:
            message = f'admission webhook "v.trainer" denied the request: ClusterTrainingRuntime "{runtime}" not found'
            return 403, _error(403, "Forbidden", message)
        with self.lock:
            if name in self.jobs:
                return 409, _error(409, "AlreadyExists", f'trainjobs "{name}" already exists')
            job["metadata"] |= {"namespace": NAMESPACE, "creationTimestamp": now(), "uid": "u"}
            self.jobs[name] = job
        self.when_created(job)
        return 201, job

    def delete(self, name: str) -> None:
        with self.lock:
            self.jobs[name]["metadata"].setdefault("deletionTimestamp", now())

        def go() -> None:
            self.when_deleted(name)
            with self.lock:
                self.jobs.pop(name, None)
                mine = [pod for pod in self.pods if _label(pod, "jobset.sigs.k8s.io/jobset-name") == name]
                self.pods = [pod for pod in self.pods if pod not in mine]

        threading.Thread(target=go, daemon=True).start()


def now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _label(pod: Json, name: str) -> str:
    return str(pod["metadata"]["labels"].get(name, ""))


def _error(code: int, reason: str, message: str) -> Json:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    state: KubernetesServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        line = f"{self.command} {url.path}"
        with self.state.lock:
            self.state.asked.append(line)
            fault = next((one for one in self.state.faults if one.times > 0 and re.search(one.pattern, line)), None)
            if fault:
                fault.times -= 1
        if fault and fault.status:
            self._send(fault.status, _error(fault.status, "Injected", fault.message))
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, _error(401, "Unauthorized", "Unauthorized"))
        else:
            status, answer = self._answer(url.path, query, body)
            self._send(status, answer, cut=fault is not None)

    do_GET = do_POST = do_DELETE = do_any  # noqa: N815

    def _answer(self, path: str, query: Mapping[str, str], body: bytes) -> tuple[int, Json | str]:
        state = self.state
        if path.startswith(JOBS):
            return self._job(path.removeprefix(JOBS).strip("/"), query, body)
        with state.lock:
            if path == f"{CORE}/pods":
                wanted = [part.split("=") for part in query["labelSelector"].split(",")]
                return 200, {"items": [pod for pod in state.pods if all(_label(pod, k) == v for k, v in wanted)]}
            if path == f"{CORE}/events":
                assert query["fieldSelector"] == "type=Warning"
                return 200, {"items": state.events}
            if found := re.fullmatch(rf"{CORE}/pods/([^/]+)/log", path):
                return self._log(found[1], query)
        return 404, _error(404, "NotFound", path)

    def _job(self, name: str, query: Mapping[str, str], body: bytes) -> tuple[int, Json | str]:
        state = self.state
        if not state.installed:
            return 404, "404 page not found\n"
        if self.command == "POST":
            assert query == {"fieldValidation": "Strict"}, "unknown fields would be dropped"
            return state.create(json.loads(body))
        with state.lock:
            if name not in state.jobs:
                return 404, _error(404, "NotFound", f'trainjobs.trainer.kubeflow.org "{name}" not found')
            if self.command == "GET":
                return 200, state.jobs[name]
        assert json.loads(body) == {"propagationPolicy": "Foreground"}
        state.delete(name)
        return 200, {"kind": "Status", "status": "Success"}

    def _log(self, pod: str, query: Mapping[str, str]) -> tuple[int, Json | str]:
        if pod not in self.state.logs:
            return 404, _error(404, "NotFound", f'pods "{pod}" not found')
        assert query["container"] == "node"
        assert query["timestamps"] == "true"
        lines = self.state.logs[pod]
        if "tailLines" in query:
            lines = lines[-int(query["tailLines"]) :]
        if "sinceSeconds" in query:
            since = datetime.now(UTC) - timedelta(seconds=int(query["sinceSeconds"]))
            lines = [line for line in lines if datetime.fromisoformat(line.split(" ")[0]) >= since]
        return 200, "".join(f"{line}\n" for line in lines)

    def _send(self, status: int, answer: Json | str, *, cut: bool = False) -> None:
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.close_connection = True


def _certificate(path: Path, key_path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    today = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return key_path


def pod_environment(server: KubernetesServer) -> dict[str, str]:
    """What Kubernetes puts into the environment of the pod that asks."""
    return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.port)}


def wait_until(check: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def tell_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
