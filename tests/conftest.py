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

from kubetuner.config.precision import PRECISIONS, missing_library

# A property is right or wrong, not quick or slow; on a shared machine a deadline measures the neighbours.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models on shared cores are fastest, and bit-reproducible, on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _libraries_of_rounding(request: pytest.FixtureRequest) -> None:
    """They slow every import of diffusers, so 'make test' runs the tests that need them in processes of their own."""
    if request.node.get_closest_marker("quantised") and any(map(missing_library, PRECISIONS)):
        pytest.skip("needs kubetuner[quantised]; 'make test' has it")
