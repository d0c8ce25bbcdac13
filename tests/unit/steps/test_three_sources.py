"""The data file of the Sana quickstart from folders, from a bucket and from the hub: one dataset, the same bytes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kubetuner.artifacts import LatentRow, LatentsArtifact, Record, Sample, TextEmbedsArtifact, TextRow, read_rows
from kubetuner.steps.cache_text_embeds import cache_text_embeds
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from tests.servers.dataset_hub import DatasetHub, DatasetRepo
from tests.servers.gcs import empty_bucket, fake_gcs
from tests.unit.steps.test_several_datasets import CONFIG, DATA, furnish

BUCKET, REPO = "team-pictures", "team/pictures"
ADDRESSES: dict[str, dict[str, Any]] = {
    "local": {},
    "gcs": {"type": "gcs", "instance_data_dir": f"gs://{BUCKET}/datasets"},
    "huggingface": {"type": "huggingface", "dataset_name": REPO, "instance_data_dir": "datasets"},
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders, and the same files in a bucket and in a repository."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    furnish(tmp_path)
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.glob("datasets/*/*")}
    with fake_gcs() as host, empty_bucket(host, BUCKET) as bucket, DatasetHub() as hub:
        for name, content in files.items():
            bucket.blob(name).upload_from_string(content)
        hub.repos[REPO] = DatasetRepo()
        hub.repos[REPO].commit(files)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}")
        monkeypatch.setenv("HF_ENDPOINT", f"http://{hub.host}")
        yield tmp_path


def entries(kind: str) -> list[dict[str, Any]]:
    """The quickstart's entries with their pictures elsewhere."""
    data: list[dict[str, Any]] = json.loads(DATA)
    for entry in data:
        if "instance_data_dir" in entry and kind != "local":
            folder = entry["instance_data_dir"].removeprefix("datasets")
            entry |= ADDRESSES[kind] | {"instance_data_dir": ADDRESSES[kind]["instance_data_dir"] + folder}
    return data


def cached(root: Path, kind: str) -> tuple[str, LatentsArtifact, TextEmbedsArtifact]:
    """The dataset's fingerprint and both caches, through the steps."""
    sections = make_plan(CONFIG, entries(kind), cwd=root).sections
    out = root / kind
    dataset = download_dataset(sections.download, out / "dataset")
    latents = cache_vae(sections.cache_vae, out / "dataset", out / "latents")
    return dataset.fingerprint, latents, cache_text_embeds(sections.cache_text_embeds, out / "dataset", out / "texts")


def rows(root: Path, kind: str) -> dict[str, list[Record]]:
    """What the artifacts list, sample by sample."""
    tables: Mapping[str, type[Record]] = {
        "dataset/samples.jsonl": Sample, "latents/latents.jsonl": LatentRow, "texts/texts.jsonl": TextRow,
    }  # fmt: skip
    return {name: list(read_rows(root / kind, name, row)) for name, row in tables.items()}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_where_the_pictures_are_decides_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBETUNER_STORE", raising=False)  # Nothing is shared, so each encodes for itself.
    expected = cached(root, "local")
    assert (expected[1].num_samples, expected[1].reused) == (6 + 3 + 4, 0)
    for kind in ("gcs", "huggingface"):
        assert cached(root, kind) == expected, kind
        assert rows(root, kind) == rows(root, "local"), kind
        for part in ("latents", "texts"):
            found, files = shards(root / "local" / part), shards(root / kind / part)
            assert found, part
            assert files == found, (kind, part)


def test_moving_the_pictures_encodes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBETUNER_STORE", str(root / "store"))
    first = cached(root, "local")
    for kind in ("gcs", "huggingface"):
        fingerprint, latents, texts = cached(root, kind)
        assert (latents.encoded, texts.encoded) == (0, 0)
        assert (fingerprint, latents.fingerprint, texts.fingerprint) == (
            first[0], first[1].fingerprint, first[2].fingerprint,
        )  # fmt: skip


def test_a_filter_of_names_is_the_same_everywhere(root: Path) -> None:
    found = set()
    for kind in ADDRESSES:
        data = entries(kind)
        for entry in data[:3]:
            entry["filter_func"] = {"path_exclude": ["0*", "re:3\\.png$"]}
        plan = make_plan(CONFIG, data, cwd=root)
        dataset = download_dataset(plan.sections.download, root / kind / "filtered")
        found.add((dataset.fingerprint, json.dumps([plan.summary["samples"], plan.summary["filtered"]])))
    ((_, counts),) = found
    assert json.loads(counts)[1]["dreambooth-subject"] == 2
