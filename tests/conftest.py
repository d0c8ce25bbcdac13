"""What every test needs: quiet threads, no network and no deadlines."""

import os

# Set before torch or a Hugging Face library is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch
from hypothesis import HealthCheck, settings

# A property is right or wrong, not quick or slow; on a shared machine a deadline measures the neighbours.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models on shared cores are fastest, and bit-reproducible, on one thread."""
    torch.set_num_threads(1)
