"""The part of Google's metadata server that workload identity asks, over real HTTP."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a-token-of-the-service-account"
_ACCOUNT = "/computeMetadata/v1/instance/service-accounts/default/"


@contextmanager
def metadata_server() -> Iterator[tuple[str, list[str]]]:
    """Host and port, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            kind, body = "application/json", json.dumps({"email": "pod@project", "scopes": [], "aliases": []})
            if self.path.startswith(f"{_ACCOUNT}token"):
                body = json.dumps({"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})
            elif not self.path.startswith(_ACCOUNT):
                kind, body = "text/plain", "googleapis.com" if "universe" in self.path else "project"
            data = body.encode()
            self.send_response(200 if self.headers.get("Metadata-Flavor") == "Google" else 403)
            headers = {"Metadata-Flavor": "Google", "Content-Type": kind, "Content-Length": str(len(data))}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"127.0.0.1:{http.server_address[1]}", asked
    finally:
        http.shutdown()
        http.server_close()
