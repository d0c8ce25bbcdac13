"""A hub over HTTP, and settings that Hugging Face's client reads when it is imported."""

import os
import tempfile
from collections.abc import Iterator

import pytest

from kubetuner.sources import base
from tests.servers.dataset_hub import DatasetHub, DatasetRepo
from tests.servers.faults import FaultyProxy

os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="kubetuner-hf-"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    """It has the empty repository ``alice/rings``."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(base, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with DatasetHub() as hub:
        hub.repos["alice/rings"] = DatasetRepo()
        yield hub


@pytest.fixture
def proxy(hub: DatasetHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What stands between the hub and us."""
    with FaultyProxy(hub.host) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", proxy.url)
        yield proxy
