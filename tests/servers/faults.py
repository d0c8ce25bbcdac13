"""A reverse proxy over real HTTP that passes requests on and, when told to, answers badly."""

import http.client
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, unquote

Kind = Literal["status", "cut", "reset", "corrupt", "hold"]
_HOP_BY_HOP = ("content-length", "transfer-encoding", "connection", "keep-alive")


@dataclass
class Fault:
    """What happens to the next ``times`` requests whose "METHOD path" matches.

    Attributes:
        kind: ``status`` answers ``value``; ``cut`` sends ``value`` bytes of the body and hangs up; ``reset`` hangs up
            at once; ``corrupt`` changes one byte of the body; ``hold`` passes it on when ``released`` is set, or after
            half a minute.
    """

    pattern: str
    kind: Kind
    value: int = 0
    times: int = 1
    released: threading.Event = field(default_factory=threading.Event)


class FaultyProxy:
    """Stands before ``upstream`` (host:port) until the ``with`` block ends.

    Attributes:
        requests: "METHOD path" of every request so far.
        ranges: The Range header of every GET that had one.
        metagenerations: Object path → how often it was patched. Once it is a dict, the proxy adds what the emulator
            lacks: patches change metagenerations, and removals compare them.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.metagenerations: dict[str, int] | None = None
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            state = proxy

        self._http = _QuietServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.host = f"127.0.0.1:{self._http.server_address[1]}"
        self.url = f"http://{self.host}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, pattern: str, kind: Kind, value: int = 0, times: int = 1) -> Fault:
        fault = Fault(pattern, kind, value, times)
        self.faults.append(fault)
        return fault

    def take(self, line: str, span: str | None) -> Fault | None:
        with self.lock:
            self.requests.append(line)
            self.ranges += [span] if span else []
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None

    def allows(self, method: str, path: str) -> bool:
        """Note a patch; whether the conditions of a removal are met."""
        name, _, query = path.partition("?")
        if self.metagenerations is None:
            return True
        with self.lock:
            known = self.metagenerations.setdefault(unquote(name.rpartition("/o/")[2]), 1)
            if method == "PATCH":
                self.metagenerations[unquote(name.rpartition("/o/")[2])] = known + 1
        expected = parse_qs(query).get("ifMetagenerationMatch")
        return method != "DELETE" or expected is None or int(expected[0]) == known

    def with_metagenerations(self, data: bytes) -> bytes:
        """An answer about objects, with their metagenerations."""
        if self.metagenerations is None or not data:
            return data
        answer = json.loads(data)
        for item in (answer, *answer.get("items", ())):
            if "metageneration" in item:
                item["metageneration"] = str(self.metagenerations.get(item["name"], 1))
        return json.dumps(answer).encode()


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    state: FaultyProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.state.take(f"{self.command} {self.path}", self.headers.get("Range"))
        if fault and fault.kind == "status":
            self._send(fault.value, [("Content-Type", "application/json")], b'{"error": {"message": "injected"}}')
            return
        if fault and fault.kind == "reset":
            self._hang_up()
            return
        if fault and fault.kind == "hold":
            fault.released.wait(30)
        if not self.state.allows(self.command, self.path):
            self._send(412, [("Content-Type", "application/json")], b'{"error": {"message": "condition not met"}}')
            return
        connection = http.client.HTTPConnection(self.state.upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        here, there = (f":{host.rpartition(':')[2]}/" for host in (self.state.host, self.state.upstream))
        kept = [
            (name, value.replace(there, here)) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP
        ]
        connection.close()
        if (answer.getheader("content-type") or "").startswith("application/json"):
            # Addresses in answers lead back through the proxy.
            data = data.replace(self.state.upstream.encode(), self.state.host.encode())
            data = self.state.with_metagenerations(data)
        if fault and fault.kind == "corrupt" and data:
            data = bytes([data[0] ^ 0xFF]) + data[1:]
        size = int(answer.getheader("content-length") or 0) if self.command == "HEAD" else len(data)
        self._send(answer.status, kept, data, size=size, cut=fault.value if fault and fault.kind == "cut" else None)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_any  # noqa: N815

    def _send(
        self,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        *,
        size: int | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.wfile.flush()
            self._hang_up(reset=False)

    def _hang_up(self, *, reset: bool = True) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.close_connection = True
