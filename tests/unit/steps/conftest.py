"""Tiny bases of the three families and datasets of noise pictures, as download_dataset leaves them."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kubetuner.config.sections.sources import DatasetSource, DownloadSection
from kubetuner.config.sections.steps import FamilyName, ModelRef
from kubetuner.steps.download_dataset import download_dataset
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

FAMILIES: tuple[FamilyName, ...] = ("pixart_sigma", "sdxl", "sana")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    root = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        write_pipeline(build_pipeline(family, "unit"), root / family)
    return {family: ModelRef(family=family, path=str(root / family), revision="r") for family in FAMILIES}


@pytest.fixture
def shared_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store of all artifacts of the test."""
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards lie in each artifact."""
    monkeypatch.delenv("KUBETUNER_STORE", raising=False)


Download = Callable[[Mapping[str, str | bytes]], Path]


@pytest.fixture
def download(tmp_path: Path) -> Download:
    """Makes a dataset artifact of files by path; the first folder of a path is the dataset's id."""

    def make(files: Mapping[str, str | bytes]) -> Path:
        number = len(list(tmp_path.glob("sources*")))
        root = tmp_path / f"sources{number}"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
        ids = sorted({name.partition("/")[0] for name in files})
        sources = tuple(
            DatasetSource(id=name, instance_data_dir=str(root / name), caption_strategy="textfile") for name in ids
        )
        download_dataset(DownloadSection(datasets=sources), tmp_path / f"dataset{number}")
        return tmp_path / f"dataset{number}"

    return make


def picture(seed: int, width: int = 64, height: int = 64) -> bytes:
    """A PNG whose pixels depend on ``seed``."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def pictures(
    dataset: str, count: int, start: int = 0, size: tuple[int, int] = (64, 64), caption: str = ""
) -> dict[str, str | bytes]:
    """``count`` different pictures and their captions."""
    files: dict[str, str | bytes] = {}
    for seed in range(start, start + count):
        files[f"{dataset}/{seed:02}.png"] = picture(seed, *size)
        files[f"{dataset}/{seed:02}.txt"] = caption or f"caption {seed}"
    return files
