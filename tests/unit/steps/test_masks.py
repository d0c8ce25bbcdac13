"""Masks from the data file to the trained weights."""

import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kubetuner.artifacts import LatentRow, LatentsArtifact, ModelArtifact, Sample, TensorSpec, read_rows
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.geometry import DatasetGeometry, Geometry
from kubetuner.config.sections.sources import DatasetSource, DownloadSection, MaskSource
from kubetuner.config.sections.steps import CacheTextSection, CacheVaeSection, DatasetSampling, ModelRef, TrainSection
from kubetuner.data.batches import Batches
from kubetuner.data.geometry import Placement
from kubetuner.data.masks import to_weights
from kubetuner.data.shards import ShardReader
from kubetuner.errors import ArtifactError, ConfigError, DatasetError
from kubetuner.families import load_family
from kubetuner.steps.cache_text_embeds import cache_text_embeds
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from kubetuner.steps.train import train
from kubetuner.store import resolve_store
from tests.unit.steps.conftest import FAMILIES, picture

SIZE = (80, 64)
CENTRE = Geometry(resolution=64, resolution_type="pixel", crop=True, crop_style="center")


def half(bright: int = 255, size: tuple[int, int] = SIZE) -> bytes:
    """A mask whose left half counts."""
    values = np.zeros((size[1], size[0]), dtype=np.uint8)
    values[:, : size[0] // 2] = bright
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def files(masks: Mapping[str, bytes] | None = None, count: int = 4) -> dict[str, bytes]:
    """``count`` pictures of 80x64 and their masks."""
    found = {f"a/{number}.png": picture(number, *SIZE) for number in range(count)}
    return found | {f"m/{number}.png": half() for number in range(count)} | dict(masks or {})


def write(root: Path, contents: Mapping[str, bytes]) -> Path:
    for name, data in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def section_of(root: Path, kind: str = "mask", share: float = 0.1) -> DownloadSection:
    a, m = (DatasetSource(id=name, instance_data_dir=str(root / name)) for name in ("a", "m"))
    masks = MaskSource.model_validate({"source": m, "kind": kind, "of": ("a",)})
    return DownloadSection(datasets=(a,), masks=(masks,), max_skipped_share=share)


def download(root: Path, out: Path, kind: str = "mask", share: float = 0.1) -> Path:
    download_dataset(section_of(root, kind, share), out)
    return out


def vae_section(model: ModelRef, geometry: Geometry = CENTRE) -> CacheVaeSection:
    return CacheVaeSection(model=model, datasets=(DatasetGeometry(id="a", geometry=geometry),), vae_batch_size=2)


def rows_of(folder: Path) -> dict[str, LatentRow]:
    return {row.sample: row for row in read_rows(folder, "latents.jsonl", LatentRow)}


def mask_of(folder: Path, row: LatentRow) -> torch.Tensor:
    return ShardReader(resolve_store(folder)).tensors(row.mask, row.mask_shard, ("mask",))["mask"]


# download_dataset


def test_masks_come_with_their_pictures(tmp_path: Path) -> None:
    root = write(tmp_path / "files", files({"m/unused.png": half()}))
    artifact = download_dataset(section_of(root), tmp_path / "out")

    samples = list(read_rows(tmp_path / "out", "samples.jsonl", Sample))
    assert [sample.id for sample in samples] == [f"a/{number}.png" for number in range(4)]
    assert {(tmp_path / "out" / sample.mask).read_bytes() for sample in samples} == {half()}
    # Four pictures, one mask that they share, and the rows.
    kept = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    assert kept == {"artifact.json", "samples.jsonl", samples[0].mask, *(sample.file for sample in samples)}
    again = download_dataset(section_of(root), tmp_path / "again")
    assert again.fingerprint == artifact.fingerprint
    (root / "m/0.png").write_bytes(half(254))
    changed = download_dataset(section_of(root), tmp_path / "out")
    other = download_dataset(section_of(root, "segmentation"), tmp_path / "other")
    assert len({artifact.fingerprint, changed.fingerprint, other.fingerprint}) == 3


def test_masks_may_come_from_another_kind_of_source(tmp_path: Path) -> None:
    root = write(tmp_path / "files", files())
    local = download_dataset(section_of(root), tmp_path / "local")
    (root / "m.csv").write_text("file\n" + "".join(f"{number}.png\n" for number in range(4)))
    table = {"file": str(root / "m.csv"), "url_column": "file"}
    source = DatasetSource.model_validate(
        {"id": "m", "type": "csv", "table": table, "instance_data_dir": str(root / "m")}
    )
    section = section_of(root)
    other = section.model_copy(update={"masks": (section.masks[0].model_copy(update={"source": source}),)})
    assert download_dataset(other, tmp_path / "csv").fingerprint == local.fingerprint


def test_two_datasets_may_share_masks(tmp_path: Path) -> None:
    root = write(tmp_path / "files", files() | {"b/1.png": picture(9, *SIZE)})
    section = section_of(root)
    b = DatasetSource(id="b", instance_data_dir=str(root / "b"))
    both = DownloadSection(
        datasets=(*section.datasets, b), masks=(section.masks[0].model_copy(update={"of": ("a", "b")}),)
    )
    download_dataset(both, tmp_path / "out")
    rows = {row.id: row.mask for row in read_rows(tmp_path / "out", "samples.jsonl", Sample)}
    assert len(rows) == 5
    assert rows["b/1.png"] == rows["a/1.png"] != ""


def test_a_picture_whose_mask_cannot_be_used_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transparent = io.BytesIO()
    Image.new("RGBA", SIZE).save(transparent, "PNG")
    bad = {
        "m/0.png": half()[:-40],
        "m/1.png": transparent.getvalue(),
        "m/2.png": half(size=(64, 80)),
        "m/3.png": half(0),
        "m/4.png": half(size=(40, 32)),
    }
    contents = files(bad, count=6)
    del contents["m/5.png"]
    root = write(tmp_path / "files", contents)
    artifact = download_dataset(section_of(root, share=0.9), tmp_path / "out")

    reasons = {skip.name: skip.reason for skip in artifact.skipped}
    assert reasons.keys() == {"a/0.png", "a/1.png", "a/2.png", "a/5.png"}
    assert reasons["a/0.png"].startswith("its mask m/0.png: damaged")
    assert "transparent" in reasons["a/1.png"]
    assert "64x80" in reasons["a/2.png"]
    assert "80x64" in reasons["a/2.png"]
    assert reasons["a/5.png"] == "it has no mask in dataset 'm'"
    assert "mask m/3.png: it is black everywhere" in caplog.text
    with pytest.raises(DatasetError, match=r"4 of 6 pictures cannot be used \(a/0.png: its mask m/0.png"):
        download_dataset(section_of(root), tmp_path / "out")


# cache_vae


@pytest.mark.usefixtures("no_store")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_is_cached_as_its_latents_are_cut(tmp_path: Path, bases: dict[str, ModelRef], family: str) -> None:
    dataset = download(write(tmp_path / "files", files({"m/1.png": half(51)})), tmp_path / "dataset")
    artifact = cache_vae(vae_section(bases[family]), dataset, tmp_path / "out")

    assert artifact.tensors == {
        "latents": TensorSpec(dtype="fp32", shape=(4, 8, 8)),
        "mask": TensorSpec(dtype="fp16", shape=(1, 8, 8)),
    }
    rows = rows_of(tmp_path / "out")
    samples = {sample.id: sample for sample in read_rows(dataset, "samples.jsonl", Sample)}
    # The picture, 80 wide, loses 8 pixels on each side: of its left half 32 pixels, 4 latents, are left.
    white = torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], dim=2)
    for name, bright in (("a/0.png", 1.0), ("a/1.png", 0.2)):
        row = rows[name]
        torch.testing.assert_close(mask_of(tmp_path / "out", row).float(), white * bright, rtol=0, atol=1e-4)
        placement = Placement(row.intermediary_size, row.crop, row.target_size, row.bucket)
        expected = to_weights((dataset / samples[name].mask).read_bytes(), "mask", placement, 8)
        assert torch.equal(mask_of(tmp_path / "out", row), expected)
    assert rows["a/0.png"].mask == rows["a/2.png"].mask != rows["a/1.png"].mask


@pytest.mark.usefixtures("shared_store")
def test_a_change_costs_what_it_touches(
    tmp_path: Path, bases: dict[str, ModelRef], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    root = write(tmp_path / "files", files())
    section = vae_section(bases["sdxl"])
    first = cache_vae(section, download(root, tmp_path / "d1"), tmp_path / "first")
    before = rows_of(tmp_path / "first")
    assert "masks: 0 reused, 1 made" in caplog.text

    (root / "m/0.png").write_bytes(half(128))
    caplog.clear()
    mask = cache_vae(section, download(root, tmp_path / "d2"), tmp_path / "mask")
    assert (mask.encoded, mask.reused) == (0, 4)
    assert "masks: 1 reused, 1 made" in caplog.text
    after = rows_of(tmp_path / "mask")
    assert {name: row.key for name, row in after.items()} == {name: row.key for name, row in before.items()}
    assert [name for name in after if after[name].mask != before[name].mask] == ["a/0.png"]
    assert mask.fingerprint != first.fingerprint

    (root / "a/1.png").write_bytes(picture(99, *SIZE))
    caplog.clear()
    changed = cache_vae(section, download(root, tmp_path / "d3"), tmp_path / "changed")
    assert (changed.encoded, changed.reused) == (1, 3)
    assert "masks: 2 reused, 0 made" in caplog.text


@pytest.mark.usefixtures("shared_store")
def test_a_segmentation_has_masks_of_its_own(tmp_path: Path, bases: dict[str, ModelRef]) -> None:
    root = write(tmp_path / "files", files({f"m/{number}.png": half(3) for number in range(4)}))
    found = {}
    for kind in ("mask", "segmentation"):
        out = tmp_path / kind
        cache_vae(vae_section(bases["sdxl"]), download(root, tmp_path / f"dataset-{kind}", kind), out)
        found[kind] = mask_of(out, rows_of(out)["a/0.png"])
    assert found["mask"].max() == pytest.approx(3 / 255, abs=1e-4)
    assert found["segmentation"].unique().tolist() == [0, 1]


@pytest.mark.usefixtures("no_store")
def test_shards_have_the_masks_of_their_samples(tmp_path: Path, bases: dict[str, ModelRef]) -> None:
    dataset = download(write(tmp_path / "files", files({"m/3.png": half(77)})), tmp_path / "dataset")
    section = vae_section(bases["sana"], CENTRE.model_copy(update={"crop_style": "random"}))
    cache_vae(section, dataset, tmp_path / "whole")
    whole = {name: mask_of(tmp_path / "whole", row) for name, row in rows_of(tmp_path / "whole").items()}
    found = {}
    for shard in range(2):
        out = tmp_path / f"part{shard}"
        cache_vae(section, dataset, out, shard=shard, num_shards=2)
        found |= {name: mask_of(out, row) for name, row in rows_of(out).items()}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], mask) for name, mask in whole.items())


@pytest.mark.usefixtures("no_store")
def test_a_damaged_mask_is_named(tmp_path: Path, bases: dict[str, ModelRef]) -> None:
    dataset = download(write(tmp_path / "files", files()), tmp_path / "dataset")
    sample = next(read_rows(dataset, "samples.jsonl", Sample))
    (dataset / sample.mask).write_bytes(half(1))
    with pytest.raises(ArtifactError, match=r"the mask of a/0\.png, is missing or damaged"):
        cache_vae(vae_section(bases["sana"]), dataset, tmp_path / "out")


@pytest.mark.usefixtures("no_store")
def test_a_crop_without_any_of_the_mask_is_said(
    tmp_path: Path, bases: dict[str, ModelRef], caplog: pytest.LogCaptureFixture
) -> None:
    edge = np.zeros((64, 80), dtype=np.uint8)
    edge[:, :6] = 255
    stream = io.BytesIO()
    Image.fromarray(edge).save(stream, "PNG")
    dataset = download(write(tmp_path / "files", files({"m/2.png": stream.getvalue()})), tmp_path / "dataset")
    cache_vae(vae_section(bases["sana"]), dataset, tmp_path / "out")
    assert "a/2.png: its mask is black all over the crop" in caplog.text


# train


def caches(tmp_path: Path, model: ModelRef, contents: Mapping[str, bytes], shards: int = 1) -> tuple[list[Path], Path]:
    root = write(tmp_path / "files", contents)
    dataset = download(root, tmp_path / "dataset")
    folders = [tmp_path / f"latents{shard}" for shard in range(shards)]
    for shard, folder in enumerate(folders):
        cache_vae(vae_section(model), dataset, folder, shard=shard, num_shards=shards)
    cache_text_embeds(CacheTextSection(model=model), dataset, tmp_path / "texts")
    return folders, tmp_path / "texts"


def train_section(model: ModelRef, **settings: object) -> TrainSection:
    base = {
        "model": model, "model_type": "lora", "lora": LoraSettings(rank=2, alpha=4.0, dropout=0.0),
        "datasets": (DatasetSampling(id="a"),), "max_train_steps": 2, "train_batch_size": 4, "mixed_precision": "no",
        "learning_rate": 1e-3, "checkpoint_step_interval": 0,
    }  # fmt: skip
    return TrainSection.model_validate(base | settings)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("no_store")
def test_several_shards_give_the_batches_of_one(tmp_path: Path, bases: dict[str, ModelRef]) -> None:
    contents = files({"m/3.png": half(77), "m/2.png": half(0)})
    names = load_family("sana").facts.text_tensors
    found = []
    for shards in (1, 2):
        folders, texts = caches(tmp_path / str(shards), bases["sana"], contents, shards)
        batch = Batches(train_section(bases["sana"]), folders, [texts], names).batch(0, 0)
        assert batch.masks is not None
        found.append({row.sample: mask for row, mask in zip(batch.rows, batch.masks, strict=True)})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert found[0]["a/3.png"].max() == pytest.approx(77 / 255, abs=1e-3)
    assert not found[0]["a/2.png"].any()


@pytest.mark.usefixtures("no_store")
@pytest.mark.parametrize("family", FAMILIES)
def test_training_counts_what_the_mask_lets_through(tmp_path: Path, bases: dict[str, ModelRef], family: str) -> None:
    """All white is no mask at all, half white has a smaller loss and other weights, all black learns nothing."""
    results = {}
    for name, bright, probability in (
        ("white", 255, 1.0),
        ("half", None, 1.0),
        ("never", None, 0.0),
        ("black", 0, 1.0),
    ):
        whole = io.BytesIO()
        Image.new("L", SIZE, bright or 0).save(whole, "PNG")
        masks = {f"m/{number}.png": half() if bright is None else whole.getvalue() for number in range(4)}
        folders, texts = caches(tmp_path / name, bases[family], files(masks))
        section = train_section(bases[family], masked_loss_probability=probability)
        model = train(section, folders, [texts], tmp_path / name / "out")
        assert isinstance(model, ModelArtifact)
        results[name] = losses(tmp_path / name / "out")
    assert results["white"] == results["never"]
    assert results["black"] == [0.0, 0.0]
    for some, full in zip(results["half"], results["white"], strict=True):
        assert 0.2 * full < some < 0.8 * full


@pytest.mark.usefixtures("no_store")
def test_a_mask_of_another_size_than_the_latents_is_refused(tmp_path: Path, bases: dict[str, ModelRef]) -> None:
    folders, texts = caches(tmp_path, bases["sana"], files())
    row = rows_of(folders[0])["a/0.png"]
    store = resolve_store(folders[0])
    shard = store.write_shard("masks", {row.mask: {"mask": torch.ones(1, 4, 4)}})
    lines = (folders[0] / "latents.jsonl").read_text().replace(row.mask_shard, shard.file)
    (folders[0] / "latents.jsonl").write_text(lines)
    document = json.loads((folders[0] / "artifact.json").read_text())
    artifact = LatentsArtifact.model_validate(document)
    from kubetuner.artifacts import describe_file, write_artifact

    fixed = {"files": (describe_file(folders[0], "latents.jsonl"),), "shards": (*artifact.shards, shard)}
    write_artifact(folders[0], artifact.model_copy(update=fixed))
    batches = Batches(train_section(bases["sana"]), folders, [texts], load_family("sana").facts.text_tensors)
    with pytest.raises(ArtifactError, match="is 4x4 and its latents 8x8"):
        batches.batch(0, 0)


# plan

CONFIG = {
    "model_type": "lora", "model_family": "sdxl", "max_train_steps": 2, "train_batch_size": 1,
    "resolution": 64, "resolution_type": "pixel",
}  # fmt: skip


def entries(**more: object) -> list[dict[str, object]]:
    return [
        {"id": "a", "instance_data_dir": "a", "conditioning_data": "m"},
        {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "m", **more},
    ]


def test_the_plan_tells_what_masks_there_are(tmp_path: Path, bases: dict[str, ModelRef]) -> None:
    write(tmp_path, files({"m/unused.png": half(), "m/0.png": half(size=(160, 128))}))
    plan = make_plan(CONFIG | {"pretrained_model_name_or_path": bases["sdxl"].path}, entries(), cwd=tmp_path)
    (masks,) = plan.sections.download.masks
    assert masks.of == ("a",)
    assert masks.source.instance_data_dir == str(tmp_path / "m")
    assert masks.source.revision
    expected = "`m` (mask): masks for all 4 pictures of `a`; 1 of another size are resized with their pictures; "
    assert expected + "1 without a picture are left out: unused.png" in plan.markdown
    download_dataset(plan.sections.download, tmp_path / "out")
    (tmp_path / "m/0.png").write_bytes(half())
    with pytest.raises(DatasetError, match=r"its masks 'm': it has changed after the run was planned"):
        download_dataset(plan.sections.download, tmp_path / "out")


def test_the_plan_refuses_pictures_without_a_mask_and_misfits(tmp_path: Path, bases: dict[str, ModelRef]) -> None:
    contents = files({"m/2.png": half(size=(64, 64))})
    del contents["m/1.png"], contents["m/3.png"]
    write(tmp_path, contents)
    with pytest.raises(ConfigError) as caught:
        make_plan(CONFIG | {"pretrained_model_name_or_path": bases["sdxl"].path}, entries(), cwd=tmp_path)
    missing, misfit = (problem.message for problem in caught.value.problems)
    assert missing.startswith("has no masks for 2 of the pictures of 'a': 1.png, 3.png.")
    assert "2.png: its mask has 64x64 pixels, aspect ratio 1.000, and the picture 80x64, 1.250" in misfit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m/0.jpg": half()}, "0.jpg and 0.png belong to the same picture"),
        ({"m/0.png": b"no picture"}, "1 of 4 pictures cannot be used (0.png: its mask 0.png: not a picture"),
    ],
)
def test_the_plan_names_bad_masks(
    tmp_path: Path, bases: dict[str, ModelRef], change: Mapping[str, bytes], message: str
) -> None:
    write(tmp_path, files(change))
    with pytest.raises(ConfigError) as caught:
        make_plan(CONFIG | {"pretrained_model_name_or_path": bases["sdxl"].path}, entries(), cwd=tmp_path)
    assert message in str(caught.value)


def test_the_plan_names_a_folder_without_masks(tmp_path: Path, bases: dict[str, ModelRef]) -> None:
    write(tmp_path, {name: data for name, data in files().items() if name.startswith("a/")})
    (tmp_path / "m").mkdir()
    with pytest.raises(ConfigError, match=r"\[1\].instance_data_dir: .* holds no masks"):
        make_plan(CONFIG | {"pretrained_model_name_or_path": bases["sdxl"].path}, entries(), cwd=tmp_path)
