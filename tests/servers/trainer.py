"""Kubeflow Trainer's part: the nodes of a TrainJob really run, as processes of this machine."""

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping

from tests.servers.kubernetes import Json, KubernetesServer


class LocalNodes:
    """Runs the nodes of every TrainJob that ``server`` takes as processes of this machine, as Trainer's pods would."""

    def __init__(self, server: KubernetesServer, environment: Mapping[str, str]) -> None:
        self._server, self._environment = server, environment
        self.running: dict[str, list[subprocess.Popen[str]]] = {}
        server.when_created, server.when_deleted = self._start, self._stop

    def _start(self, job: Json) -> None:
        name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        given = {one["name"]: one["value"] for one in trainer["env"]}
        nodes, pods = [], []
        for rank in range(trainer["numNodes"]):
            places = {
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": str(trainer.get("numProcPerNode", "auto")),
                "PET_NODE_RANK": str(rank),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(port),
            }
            command = [sys.executable if part == "python3" else part for part in trainer["command"]] + trainer["args"]
            pods.append(self._server.add_pod(name, rank, {"state": {"running": {}}}, phase="Running"))
            output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            environment = dict(self._environment) | given | places
            nodes.append(subprocess.Popen(command, env=environment, text=True, **output))  # type: ignore[call-overload]
        self.running[name] = nodes
        for node, pod in zip(nodes, pods, strict=True):
            threading.Thread(target=self._watch, args=(name, node, pod), daemon=True).start()

    def _watch(self, name: str, node: "subprocess.Popen[str]", pod: Json) -> None:
        assert node.stdout is not None
        for line in node.stdout:
            self._server.print(pod["metadata"]["name"], line.rstrip("\n"))
        node.stdout.close()
        code = node.wait()
        ended = {"exitCode": code if code >= 0 else 128 - code, "reason": "Error" if code else "Completed"}
        with self._server.lock:
            pod["status"]["containerStatuses"][1]["state"] = {"terminated": ended}
            if name in self._server.jobs and all(one.poll() == 0 for one in self.running[name]):
                self._server.end(name, "Complete")

    def _stop(self, name: str) -> None:
        for node in self.running.get(name, ()):
            node.send_signal(signal.SIGTERM)
        for node in self.running.get(name, ()):
            node.wait()
