"""What needs a GPU: skipped without one."""

import os

# Read when cuBLAS starts: without it, sums are made in whatever order threads finish.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.recipes.demo.models import build_pipeline, write_pipeline
from tests.unit.training.conftest import TEXT, Setup


@pytest.fixture(autouse=True, scope="session")
def _a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


@pytest.fixture(scope="session")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    bases = tmp_path_factory.mktemp("bases")
    for family in TEXT:
        write_pipeline(build_pipeline(family, "unit"), bases / family)
    return Setup(Path(bases), torch.device("cuda"))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
