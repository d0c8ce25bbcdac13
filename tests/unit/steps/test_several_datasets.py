"""The data file of SimpleTuner's Sana quickstart, at an eighth of its sizes: two resolutions of one folder,
regularisation data, and a text entry; from the plan to a trained model."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kubetuner.artifacts import LatentRow, Sample, read_rows
from kubetuner.data.batches import Batches
from kubetuner.errors import ConfigError
from kubetuner.steps.cache_text_embeds import cache_text_embeds
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from kubetuner.steps.train import train
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

DATA = """[
  {
    "id": "pseudo-camera-10k-sana", "type": "local", "crop": true, "crop_aspect": "square", "crop_style": "center",
    "resolution": 64, "minimum_image_size": 64, "maximum_image_size": 64, "target_downsample_size": 64,
    "resolution_type": "pixel_area", "cache_dir_vae": "cache/vae/sana/pseudo-camera-10k",
    "instance_data_dir": "datasets/pseudo-camera-10k", "disabled": false, "skip_file_discovery": "",
    "caption_strategy": "filename", "metadata_backend": "discovery", "repeats": 0, "is_regularisation_data": true
  },
  {
    "id": "dreambooth-subject", "type": "local", "crop": false, "resolution": 128, "minimum_image_size": 128,
    "maximum_image_size": 128, "target_downsample_size": 128, "resolution_type": "pixel_area",
    "cache_dir_vae": "cache/vae/sana/dreambooth-subject", "instance_data_dir": "datasets/dreambooth-subject",
    "caption_strategy": "instanceprompt", "instance_prompt": "the name of your subject goes here",
    "metadata_backend": "discovery", "repeats": 1000
  },
  {
    "id": "dreambooth-subject-512", "type": "local", "crop": false, "resolution": 64, "minimum_image_size": 64,
    "maximum_image_size": 64, "target_downsample_size": 64, "resolution_type": "pixel_area",
    "cache_dir_vae": "cache/vae/sana/dreambooth-subject-512", "instance_data_dir": "datasets/dreambooth-subject",
    "caption_strategy": "instanceprompt", "instance_prompt": "the name of your subject goes here",
    "metadata_backend": "discovery", "repeats": 1000
  },
  {
    "id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": true,
    "cache_dir": "cache/text/sana", "disabled": false, "write_batch_size": 128
  }
]"""
CONFIG: dict[str, Any] = {
    "model_type": "full", "model_family": "sana", "pretrained_model_name_or_path": "base", "train_batch_size": 2,
    "max_train_steps": 4, "num_train_epochs": 0, "mixed_precision": "no",
}  # fmt: skip
SUBJECT = [(128, 128), (160, 110), (80, 240), (100, 100)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("sana"))


def furnish(root: Path) -> Path:
    """``root`` with a tiny Sana in ``base`` and the pictures of :data:`DATA` in ``datasets``."""
    write_pipeline(build_pipeline("sana", "unit"), root / "base")
    camera, subject = root / "datasets/pseudo-camera-10k", root / "datasets/dreambooth-subject"
    for folder in (camera, subject):
        folder.mkdir(parents=True)
    for index in range(6):
        Image.effect_noise((70 + 30 * index, 90), 60).convert("RGB").save(camera / f"a_photo_{index}.png")
    for index, size in enumerate(SUBJECT):
        Image.effect_noise(size, 60).convert("RGB").save(subject / f"{index}.png")
    return root


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "store"))
    for name in ("MLFLOW_TRACKING_URI", "KUBETUNER_CHECKPOINTS"):
        monkeypatch.delenv(name, raising=False)


def test_the_quickstarts_data_file_is_planned(root: Path) -> None:
    plan = make_plan(CONFIG, json.loads(DATA), cwd=root)
    assert plan.summary["samples"] == {
        "pseudo-camera-10k-sana": 6, "dreambooth-subject": 3, "dreambooth-subject-512": 4,
    }  # fmt: skip
    assert plan.summary["skipped"] == {
        "pseudo-camera-10k-sana": 0, "dreambooth-subject": 1, "dreambooth-subject-512": 0,
    }  # fmt: skip
    assert plan.summary["repeats"]["dreambooth-subject"] == 1000  # type: ignore[index]
    assert plan.summary["buckets"]["dreambooth-subject"] == {"1.0": 2, "0.33": 1}  # type: ignore[index]
    # Batches of 2: 2 * 1001 of 128 x 128, and 1000 of 1001 of 64 x 192; likewise 3002 and 1000 at 64.
    assert plan.summary["samples_per_epoch"] == {
        "pseudo-camera-10k-sana": 6, "dreambooth-subject": 3002, "dreambooth-subject-512": 4002,
    }  # fmt: skip
    assert plan.summary["steps_per_epoch"] == (6 + 3002 + 4002) // 2
    assert "`dreambooth-subject/3.png`: 100x100 pixels: the area is below minimum_image_size 128" in plan.markdown
    reasons = "\n".join(plan.run.notes)
    assert "[0].`is_regularisation_data`: has no effect on a full fine-tune" in reasons
    assert "[3].`write_batch_size`: shards are written whole" in reasons
    assert "[1].`maximum_image_size`: without crop" in reasons


def test_missing_folders_are_told_before_anything_runs(tmp_path: Path, root: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan({**CONFIG, "pretrained_model_name_or_path": str(root / "base")}, json.loads(DATA), cwd=tmp_path)
    assert [problem.where for problem in caught.value.problems] == [
        f"multidatabackend.json[{index}].instance_data_dir" for index in range(3)
    ]


def test_a_picture_is_kept_once_and_encoded_once_per_geometry(root: Path, tmp_path: Path) -> None:
    data = json.loads(DATA)
    data.append({**data[2], "id": "again", "cache_dir_vae": "cache/again", "repeats": 0})
    sections = make_plan(CONFIG, data, cwd=root).sections
    dataset = download_dataset(sections.download, tmp_path / "dataset")
    samples = {row.id: row for row in read_rows(tmp_path / "dataset", "samples.jsonl", Sample)}
    assert dataset.num_samples == 6 + 4 + 4 + 4
    assert len({row.file for row in samples.values()}) == 6 + 4
    assert samples["dreambooth-subject/1.png"].file == samples["dreambooth-subject-512/1.png"].file

    latents = cache_vae(sections.cache_vae, tmp_path / "dataset", tmp_path / "latents")
    assert (latents.num_samples, latents.encoded, latents.reused) == (6 + 3 + 4 + 4, 6 + 3 + 4, 4)
    assert [skip.name for skip in latents.skipped] == ["dreambooth-subject/3.png"]
    rows = {row.sample: row for row in read_rows(tmp_path / "latents", "latents.jsonl", LatentRow)}
    assert rows["again/1.png"].key == rows["dreambooth-subject-512/1.png"].key
    assert rows["again/1.png"].key != rows["dreambooth-subject/1.png"].key
    assert rows["dreambooth-subject/0.png"].target_size == (128, 128)
    assert rows["dreambooth-subject-512/0.png"].target_size == (64, 64)


def test_a_plans_random_aspects_are_the_caches(root: Path, tmp_path: Path) -> None:
    drawn = {
        "id": "drawn", "instance_data_dir": "datasets/pseudo-camera-10k", "resolution": 128, "crop": True,
        "crop_aspect": "random", "crop_aspect_buckets": [0.4, 1.0, 2.5],
    }  # fmt: skip
    plan = make_plan(CONFIG, [drawn, {**drawn, "id": "b", "max_num_samples": 2}], cwd=root)
    download_dataset(plan.sections.download, tmp_path / "dataset")
    latents = cache_vae(plan.sections.cache_vae, tmp_path / "dataset", tmp_path / "latents")
    counted: dict[str, Counter[str]] = {"drawn": Counter(), "b": Counter()}
    for row in read_rows(tmp_path / "latents", "latents.jsonl", LatentRow):
        counted[row.dataset][row.bucket] += 1
    assert plan.summary["buckets"] == counted
    assert len(counted["drawn"]) > 1
    assert latents.reused == 2


@pytest.mark.parametrize("model_type", ["full", "lora"])
def test_all_backends_are_trained_on(root: Path, tmp_path: Path, model_type: str) -> None:
    data = json.loads(DATA)
    data[0]["probability"] = 400.0  # 6 pictures against 7004: without it, 6 steps would hardly meet one
    config = {**CONFIG, "model_type": model_type, "max_train_steps": 6}
    sections = make_plan(config, data, cwd=root).sections
    dataset, latents, texts = (tmp_path / name for name in ("dataset", "latents", "texts"))
    download_dataset(sections.download, dataset)
    cache_vae(sections.cache_vae, dataset, latents)
    cache_text_embeds(sections.cache_text_embeds, dataset, texts)
    batches = Batches(sections.train, [latents], [texts], ("embeds",))
    assert batches.batches_per_epoch == (6 + 3002 + 4002) // 2
    met = {batches.batch(step, 0).rows[0].dataset for step in range(6)}
    assert met == {"pseudo-camera-10k-sana", "dreambooth-subject", "dreambooth-subject-512"}
    for section in (sections.download, sections.cache_vae, sections.cache_text_embeds, sections.train):
        assert type(section).from_json(section.to_json()) == section
    regularising = [one.id for one in sections.train.datasets if one.is_regularisation_data]
    assert regularising == (["pseudo-camera-10k-sana"] if model_type == "lora" else [])

    artifact = train(sections.train, [latents], [texts], tmp_path / "model")
    assert artifact.steps == 6
