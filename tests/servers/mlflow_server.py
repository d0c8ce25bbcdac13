"""A real MLflow server process that tests can stop, kill and start again, and a proxy that loses its answers."""

import contextlib
import http.client
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

START_SECONDS = 90.0


def free_port() -> int:
    """A port nobody listens at, below those that outgoing connections take: nobody takes it while a server is down."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port between 20000 and 32000")


class MlflowServer:
    """``mlflow server`` on SQLite; everything is in ``folder``, so a restarted server knows what the killed one did."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it where it does not run, and wait until it answers."""
        if self._process is None:
            command = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1"]
            command += ["--port", str(self.port), "--workers", "1"]
            command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
            command += ["--artifacts-destination", str(self.folder / "artifacts")]
            environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
            environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            with (self.folder / "server.log").open("ab") as log:
                self._process = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, start_new_session=True
                )
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no MLflow server:\n{(self.folder / 'server.log').read_text()[-3000:]}")
            time.sleep(0.2)

    def hang(self) -> None:
        """It still takes connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(30)
        self._process = None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended on its own
                os.killpg(self._process.pid, number)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@dataclass
class Fault:
    """What happens to the next ``times`` requests whose "METHOD path" matches: ``status`` 0 loses the answer."""

    pattern: str
    status: int
    times: int


class Proxy:
    """Stands before the server at ``target`` until the ``with`` block ends.

    Attributes:
        requests: "METHOD path" of every request that reached the server.
    """

    def __init__(self, target: str) -> None:
        self.target = target.removeprefix("http://")
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            state = proxy

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def lose_answer(self, pattern: str, times: int = 1) -> None:
        """Carry out matching requests and hang up."""
        self.faults.append(Fault(pattern, 0, times))

    def refuse(self, pattern: str, status: int, times: int) -> None:
        """Answer ``status`` in the server's place."""
        self.faults.append(Fault(pattern, status, times))

    def count(self, pattern: str) -> int:
        return sum(1 for line in self.requests if re.search(pattern, line))

    def fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    state: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_any(self) -> None:
        line = f"{self.command} {self.path}"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.state.fault(line)
        if fault is not None and fault.status:
            self._answer(fault.status, b"refused by the proxy", {"Content-Type": "text/plain"})
            return
        upstream = http.client.HTTPConnection(self.state.target, timeout=60)
        try:
            dropped = {"host", "connection", "transfer-encoding"}
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        with self.state.lock:
            self.state.requests.append(line)
        if fault is not None:
            self.close_connection = True
            return
        kept = {name: value for name, value in answer.getheaders() if name.lower() in {"content-type", "etag"}}
        self._answer(answer.status, content, kept)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_any  # noqa: N815

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
