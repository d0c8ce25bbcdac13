"""The part of a Hugging Face hub that reading a dataset needs, over real HTTP and in memory.

Large files are answered as the hub does: with a redirect to another host, which takes ranges.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".parquet", ".png")
PAGE = 5


@dataclass
class DatasetRepo:
    """Files by commit; ``refs`` names commits."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        state = [self.refs.get(ref), sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())]
        oid = hashlib.sha1(json.dumps(state).encode()).hexdigest()
        self.commits[oid], self.refs[ref] = dict(files), oid
        return oid


class DatasetHub:
    """Serves until the ``with`` block ends.

    Attributes:
        repos: Repositories by id.
        token: What opens private repositories.
        authorized: Paths that were asked for with a token.
    """

    def __init__(self, token: str = "hf_reader") -> None:
        self.repos: dict[str, DatasetRepo] = {}
        self.token = token
        self.authorized: list[str] = []
        hub = self

        class Handler(_Handler):
            state = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.host = f"127.0.0.1:{self.port}"

    def __enter__(self) -> "DatasetHub":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    state: DatasetHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        if self.headers.get("Authorization"):
            self.state.authorized.append(path)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(revision|tree)/(.+)", path):
            self._api(match[1], match[2], match[3], int(parse_qs(parts.query).get("cursor", ["0"])[0]))
        elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/_cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            self._part(self.state.repos[match[1]].commits[match[2]][match[3]])
        else:
            self._refuse("no such route", "EntryNotFound")

    def _commit(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self.state.repos.get(repo_id)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {self.state.token}"):
            self._refuse("Repository not found", "RepoNotFound", 401)
            return None
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            self._refuse("Invalid rev id", "RevisionNotFound")
            return None
        return oid, repo.commits[oid]

    def _api(self, repo_id: str, kind: str, revision: str, cursor: int) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        oid, files = found
        if kind == "revision":
            answer = {"id": repo_id, "sha": oid, "private": False, "tags": [], "siblings": []}
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            return
        rows: list[dict[str, object]] = [{"type": "directory", "path": "data", "size": 0, "oid": "0" * 40}]
        for name, data in sorted(files.items()):
            row: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
            if name.endswith(LFS_SUFFIXES):
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            rows.append(row)
        headers = {"Content-Type": "application/json"}
        if cursor + PAGE < len(rows):
            url = f"http://{self.headers['Host']}{urlsplit(self.path).path}?recursive=true&cursor={cursor + PAGE}"
            headers["Link"] = f'<{url}>; rel="next"'
        self._send(200, json.dumps(rows[cursor : cursor + PAGE]).encode(), headers)

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        oid, files = found
        if name not in files:
            self._refuse("Entry not found", "EntryNotFound")
        elif name.endswith(LFS_SUFFIXES):
            location = f"http://localhost:{self.state.port}/_cdn/{repo_id}/{oid}/{name}"
            self._send(302, b"", {"Location": location, "X-Repo-Commit": oid})
        else:
            self._part(files[name])

    def _part(self, data: bytes) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            self._send(200, data)
            return
        start, stop = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
        self._send(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def _refuse(self, message: str, code: str, status: int = 404) -> None:
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
