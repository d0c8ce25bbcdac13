from pathlib import Path

import pytest
import torch

from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.steps import ModelRef
from pipelines.recipes.demo.models import FAMILIES, build_pipeline, write_pipeline


@pytest.fixture(scope="session")
def refs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    """One half-precision folder per family, as stock diffusers writes it."""
    root: Path = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        write_pipeline(build_pipeline(family, "unit"), root / family)
    return {name: ModelRef(family=name, path=str(root / name), revision="hash of the folder") for name in FAMILIES}


@pytest.fixture
def rows() -> list[LatentRow]:
    """Three samples whose sizes and crops all differ."""
    return [
        LatentRow(
            sample=str(i),
            dataset="d",
            key=str(i),
            shard="s",
            intermediary_size=(70 + i, 80 + i),
            crop=(i, 2 * i),
            target_size=(32, 64),
            bucket="0.5",
        )
        for i in range(3)
    ]


@pytest.fixture(scope="session")
def cpu() -> torch.device:
    return torch.device("cpu")
