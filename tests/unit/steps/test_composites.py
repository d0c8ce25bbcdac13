"""``composite_image_config`` from the data file to latents: as if every tile had been a file of its own."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kubetuner.artifacts import LATENTS_FILE, SAMPLES_FILE, LatentRow, Sample, read_rows
from kubetuner.data.pictures import open_picture
from kubetuner.errors import ConfigError
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import Plan, make_plan
from pipelines.recipes.demo.models import build_pipeline, write_pipeline
from tests.servers.dataset_hub import DatasetHub, DatasetRepo

SIZES = ((192, 64), (192, 64), (288, 64), (192, 96))
CONFIG: dict[str, Any] = {
    "model_type": "full", "model_family": "sana", "pretrained_model_name_or_path": "base", "train_batch_size": 1,
    "max_train_steps": 4, "num_train_epochs": 0, "mixed_precision": "no",
}  # fmt: skip
TILES = {"enabled": True, "image_count": 3, "select_index": 1}


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``wide`` has three pictures in each file, ``cut-0`` to ``cut-2`` have each of them in a file."""
    root = tmp_path_factory.mktemp("composites")
    write_pipeline(build_pipeline("sana", "unit"), root / "base")
    for number, (width, height) in enumerate(SIZES):
        colours = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image, third = Image.fromarray(colours), width // 3
        tiles = [image.crop((third * index, 0, third * (index + 1), height)) for index in range(3)]
        for folder, one in (("wide", image), *((f"cut-{index}", tile) for index, tile in enumerate(tiles))):
            (root / folder).mkdir(exist_ok=True)
            one.save(root / folder / f"{number}.png")
    return root


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with DatasetHub() as hub:
        hub.repos["alice/wide"] = DatasetRepo()
        monkeypatch.setenv("HF_ENDPOINT", f"http://{hub.host}")
        yield hub


def entry(folder: str, **more: Any) -> dict[str, Any]:
    return {"id": "set", "instance_data_dir": folder, "resolution": 64, **more}


def planned(root: Path, *entries: dict[str, Any], **more: Any) -> Plan:
    return make_plan({**CONFIG, **more}, list(entries), cwd=root)


@pytest.mark.parametrize("index", range(3))
def test_tiles_are_like_files_of_their_own(root: Path, tmp_path: Path, index: int) -> None:
    tiled = planned(root, entry("wide", composite_image_config=TILES | {"select_index": index}))
    plain = planned(root, entry(f"cut-{index}"))
    assert tiled.summary == plain.summary
    assert tiled.sections.download != plain.sections.download
    assert tiled.sections.cache_vae == plain.sections.cache_vae
    prints, keys = set(), set()
    for name, plan in (("tiled", tiled), ("plain", plain)):
        prints.add(download_dataset(plan.sections.download, tmp_path / name).fingerprint)
        cache_vae(plan.sections.cache_vae, tmp_path / name, tmp_path / f"{name}-latents")
        found = read_rows(tmp_path / f"{name}-latents", LATENTS_FILE, LatentRow)
        keys.add(tuple((row.sample, row.key, row.target_size) for row in found))
    assert len(prints) == len(keys) == 1


def test_a_hub_dataset_with_and_without_columns_of_sizes(hub: DatasetHub, root: Path, tmp_path: Path) -> None:
    wide = [
        {"image": {"bytes": (root / "wide" / f"{number}.png").read_bytes(), "path": f"{number}.png"}}
        for number in range(len(SIZES))
    ]
    sized = [row | {"width": width, "height": height} for row, (width, height) in zip(wide, SIZES, strict=True)]
    there = {"dataset_name": "alice/wide", "composite_image_config": TILES}
    given = {"id": "set", "type": "huggingface", "huggingface": there, "resolution": 64}
    plain = planned(root, entry("cut-1"))
    expected = download_dataset(plain.sections.download, tmp_path / "plain").fingerprint
    for rows in (wide, sized):
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), stream)
        hub.repos["alice/wide"].commit({"train.parquet": stream.getvalue()})
        plan = planned(root, given)
        assert plan.summary == plain.summary
        assert download_dataset(plan.sections.download, tmp_path / "hub").fingerprint == expected
        assert _sizes(tmp_path / "hub") == [(width // 3, height) for width, height in SIZES]


def test_two_tiles_of_one_folder(root: Path, tmp_path: Path) -> None:
    left, right = (
        entry("wide", id=name, composite_image_config=TILES | {"select_index": index})
        for name, index in (("left", 0), ("right", 2))
    )
    plan = planned(root, left, right, entry("wide", id="whole"))
    assert download_dataset(plan.sections.download, tmp_path).num_samples == 3 * len(SIZES)
    samples = list(read_rows(tmp_path, SAMPLES_FILE, Sample))
    assert len({sample.sha256 for sample in samples}) == len(samples)
    for sample in samples:
        number = sample.id.rpartition("/")[2]
        origin = {"left": "cut-0", "right": "cut-2", "whole": "wide"}[sample.dataset]
        found = open_picture(tmp_path / sample.file)
        assert found.size == (sample.width, sample.height)
        assert found.tobytes() == open_picture(root / origin / number).tobytes()


def test_pictures_that_training_encodes_are_tiles_too(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "store"))
    plan = planned(root, entry("wide", composite_image_config=TILES, vae_cache_ondemand=True))
    download_dataset(plan.sections.download, tmp_path / "out", tmp_path / "pictures")
    assert plan.sections.download.on_demand == ("set",)
    for sample in read_rows(tmp_path / "out", SAMPLES_FILE, Sample):
        assert open_picture(tmp_path / "pictures" / sample.file).size == (sample.width, sample.height)


def test_the_picture_and_its_mask_side_by_side(root: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    for number in range(4):
        pair = Image.new("RGB", (128, 64), (10 * number, 200, 30))
        pair.paste("white", (64, 0, 96 + number, 64))
        pair.paste("black", (96 + number, 0, 128, 64))
        pair.save(tmp_path / "pairs" / f"{number}.png")
    half = {"enabled": True, "image_count": 2}
    pictures = entry(str(tmp_path / "pairs"), composite_image_config=half, conditioning_data="m")
    masks = {
        "id": "m", "dataset_type": "conditioning", "conditioning_type": "mask",
        "instance_data_dir": str(tmp_path / "pairs"), "composite_image_config": half | {"select_index": 1},
    }  # fmt: skip
    plan = planned(root, pictures, masks)
    assert "masks for all 4 pictures of `set`" in plan.markdown
    assert "resized" not in plan.markdown
    assert download_dataset(plan.sections.download, tmp_path / "out").skipped == ()
    for number, sample in enumerate(read_rows(tmp_path / "out", SAMPLES_FILE, Sample)):
        assert open_picture(tmp_path / "out" / sample.file).getcolors() == [(64 * 64, (10 * number, 200, 30))]
        assert sample.mask
        white = np.asarray(open_picture(tmp_path / "out" / sample.mask))[..., 0] == 255
        assert white.sum() == (32 + number) * 64
    # Masks of another number of tiles are of another shape than their pictures.
    wrong = masks | {"composite_image_config": {"enabled": True, "image_count": 4}}
    with pytest.raises(ConfigError, match="masks of another shape than their pictures"):
        planned(root, pictures, wrong)


def test_widths_that_do_not_divide_are_named(root: Path, tmp_path: Path) -> None:
    nine = {"enabled": True, "image_count": 9}  # 192 / 9 leaves a rest, 288 / 9 does not
    given = entry("wide", composite_image_config=nine)
    with pytest.raises(ConfigError) as caught:
        planned(root, given)
    (problem,) = caught.value.problems
    reason = "0.png: its width of 192 pixels is not that of 9 equal pictures side by side (composite_image_config)"
    assert problem.message.startswith("3 of 4 pictures")
    assert f"({reason}; 1.png: " in problem.message
    plan = planned(root, given, max_skipped_share=0.8)
    assert plan.summary["skipped"] == {"set": 3}
    assert f"- `set/{reason.replace(': ', '`: ', 1)}" in plan.markdown
    artifact = download_dataset(plan.sections.download, tmp_path / "out")
    assert [skip.name for skip in artifact.skipped] == ["set/0.png", "set/1.png", "set/3.png"]
    assert {skip.reason for skip in artifact.skipped} == {reason.partition(": ")[2]}


def _sizes(out: Path) -> list[tuple[int, int]]:
    return [(sample.width, sample.height) for sample in read_rows(out, SAMPLES_FILE, Sample)]
