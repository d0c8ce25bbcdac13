"""A small Hugging Face hub over real HTTP, in memory: what the client needs to publish a model and read it back."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".png")


@dataclass(frozen=True)
class StoredFile:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        content = self.content
        if self.lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
            content = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    private: bool
    head: str = ""
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, StoredFile], title: str) -> str:
        listing = sorted((path, stored.blob_id) for path, stored in files.items())
        self.head = hashlib.sha1(json.dumps([self.head, title, listing]).encode()).hexdigest()
        self.commits[self.head] = files
        self.titles.append(title)
        return self.head

    @property
    def files(self) -> dict[str, StoredFile]:
        """What is on ``main``."""
        return self.commits[self.head]


@dataclass
class Fault:
    """Answers ``status`` to the next ``times`` requests whose "METHOD path" matches."""

    pattern: str
    status: int
    times: int


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", url: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.body = {"error": message} | ({"url": url} if url else {})


class HubServer:
    """Serves until the ``with`` block ends.

    Attributes:
        users: Tokens and whose they are.
        repos: Repositories by id.
        requests: "METHOD path" of every request so far.
        corrupt_lfs: Damage every large file on arrival, without saying so.
    """

    def __init__(self, users: Mapping[str, str]) -> None:
        self.users = dict(users)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.corrupt_lfs = False
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, pattern: str, status: int, times: int = 1) -> None:
        self.faults.append(Fault(pattern, status, times))

    def create(self, repo_id: str, *, private: bool) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit({}, "initial commit")
        return repo

    def injected(self, line: str) -> int:
        with self.lock:
            self.requests.append(line)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault.status
        return 0


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_any(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        user = self.server_state.users.get(token, "")
        try:
            if status := self.server_state.injected(f"{self.command} {path}"):
                raise RefusedError(status, "injected fault")
            if token and not user:
                raise RefusedError(401, "Invalid username or password.")
            with self.server_state.lock:
                self._answer(200, self._route(path)(user, body))
        except RefusedError as refused:
            headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._answer(refused.status, refused.body, headers)

    do_GET = do_POST = do_PUT = do_any  # noqa: N815

    def _route(self, path: str) -> Callable[[str, bytes], object]:
        repo = r"([^/]+/[^/]+)"
        routes: list[tuple[str, Callable[..., object]]] = [
            (r"GET /api/whoami-v2", self._whoami),
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", self._validate),
            (rf"POST /api/models/{repo}/preupload/main", self._preupload),
            (rf"POST /{repo}\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"PUT /_lfs/([0-9a-f]{64})", self._lfs_put),
            (r"POST /_verify", self._lfs_verify),
            (rf"POST /api/models/{repo}/commit/main", self._commit),
            (rf"GET /api/models/{repo}/revision/([^/]+)", self._info),
            (rf"GET /api/models/{repo}", self._info),
        ]
        for pattern, call in routes:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                groups = match.groups()
                return lambda user, body: call(user, body, *groups)
        raise RefusedError(404, f"no route for {self.command} {path}")

    def _whoami(self, user: str, body: bytes) -> object:
        if not user:
            raise RefusedError(401, "Invalid credentials")
        token = {"displayName": "test", "role": "write"}
        return {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}

    def _create(self, user: str, body: bytes) -> object:
        if not user:
            raise RefusedError(401, "Unauthorized")
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        if repo_id.split("/")[0] != user:
            raise RefusedError(403, f"You don't have the rights to create a model under the namespace {repo_id}")
        if repo_id in self.server_state.repos:
            raise RefusedError(409, "You already created this model repo", url=f"{self.server_state.url}/{repo_id}")
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server_state.create(repo_id, private=private)
        return {"url": f"{self.server_state.url}/{repo_id}", "name": repo_id, "id": repo_id}

    def _validate(self, user: str, body: bytes) -> object:
        return {"errors": [], "warnings": []}

    def _preupload(self, user: str, body: bytes, repo_id: str) -> object:
        files = self._writable(user, repo_id).files

        def answer(path: str) -> dict[str, object]:
            old = files.get(path)
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = (old.sha256 if old.lfs else old.blob_id) if old else None
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        return {"files": [answer(entry["path"]) for entry in json.loads(body)["files"]]}

    def _lfs_batch(self, user: str, body: bytes, repo_id: str) -> object:
        self._writable(user, repo_id)
        url = self.server_state.url
        objects = []
        for asked in json.loads(body)["objects"]:
            entry: dict[str, object] = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if asked["oid"] not in self.server_state.blobs:
                upload = {"href": f"{url}/_lfs/{asked['oid']}", "header": {}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{url}/_verify", "header": {}}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, user: str, body: bytes, oid: str) -> object:
        self.server_state.blobs[oid] = b"\0" + body[1:] if self.server_state.corrupt_lfs else body
        return {}

    def _lfs_verify(self, user: str, body: bytes) -> object:
        if json.loads(body)["oid"] not in self.server_state.blobs:
            raise RefusedError(404, "no such object")
        return {}

    def _commit(self, user: str, body: bytes, repo_id: str) -> object:
        repo = self._writable(user, repo_id)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        files = dict(repo.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = StoredFile(self.server_state.blobs[value["oid"]], lfs=True)
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise RefusedError(400, f"cannot do {line['key']}")
        oid = repo.commit(files, lines[0]["value"]["summary"])
        url = f"{self.server_state.url}/{repo_id}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}

    def _info(self, user: str, body: bytes, repo_id: str, revision: str = "main") -> object:
        repo = self._visible(user, repo_id)
        commit = repo.head if revision == "main" else revision
        if commit not in repo.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        siblings: list[dict[str, Any]] = []
        for path, stored in sorted(repo.commits[commit].items()):
            size = len(stored.content)
            row: dict[str, Any] = {"rfilename": path, "size": size, "blobId": stored.blob_id}
            if stored.lfs:
                row["lfs"] = {"sha256": stored.sha256, "size": size, "pointerSize": 130}
            siblings.append(row)
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit,
            "private": repo.private,
            "tags": [],
            "siblings": siblings,
        }

    def _visible(self, user: str, repo_id: str) -> Repo:
        repo = self.server_state.repos.get(repo_id)
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, user: str, repo_id: str) -> Repo:
        repo = self._visible(user, repo_id)
        if user != repo_id.split("/")[0]:
            raise RefusedError(403, "Forbidden: no write access")
        return repo

    def _body(self) -> bytes:
        if (self.headers.get("Transfer-Encoding") or "").lower() == "chunked":
            return b"".join(self._chunks())
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().strip() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int, content: object, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        lfs = "/info/lfs/" in self.path
        self.send_header("Content-Type", "application/vnd.git-lfs+json" if lfs else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
