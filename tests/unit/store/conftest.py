"""A store in a bucket of a real emulator process, behind a proxy that misbehaves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kubetuner import google_storage
from tests.servers.faults import FaultyProxy
from tests.servers.gcs import empty_bucket, fake_gcs, let_go

ADDRESS = "gs://store-bucket/team/store"


@pytest.fixture(scope="session")
def emulator() -> Iterator[str]:
    with fake_gcs() as host:
        yield host


@pytest.fixture
def bucket(emulator: str) -> Iterator[Any]:
    """The empty bucket, reached past the proxy."""
    with empty_bucket(emulator, "store-bucket") as bucket:
        yield bucket


@pytest.fixture
def proxy(emulator: str, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with FaultyProxy(emulator) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        monkeypatch.setenv("KUBETUNER_STORE", ADDRESS)
        monkeypatch.setenv("KUBETUNER_STORE_CACHE", str(tmp_path / "mirror"))
        monkeypatch.setenv("KUBETUNER_STORE_CACHE_GIB", "1")
        monkeypatch.setattr(google_storage, "RETRY_SECONDS", 20.0)
        yield proxy
    let_go()
