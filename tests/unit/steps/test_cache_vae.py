import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kubetuner.artifacts import (
    LatentRow,
    LatentsArtifact,
    Sample,
    TensorSpec,
    read_artifact,
    read_rows,
    verify_files,
)
from kubetuner.config.sections.geometry import DatasetGeometry, Geometry
from kubetuner.config.sections.steps import CacheVaeSection, ModelRef
from kubetuner.data.geometry import Placement
from kubetuner.data.pictures import open_picture, to_pixels
from kubetuner.data.shards import ShardReader
from kubetuner.errors import ArtifactError
from kubetuner.families import load_family
from kubetuner.steps import cache_vae as module
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.store import Store, resolve_store
from tests.unit.conftest import fork, wait
from tests.unit.steps.conftest import FAMILIES, Download, picture, pictures

SMALL = Geometry(resolution=64, resolution_type="pixel", crop_style="center")


@pytest.mark.usefixtures("no_store")
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_what_the_family_encodes(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, family: str
) -> None:
    files = pictures("a", 2, size=(70, 66)) | pictures("a", 2, start=2, size=(64, 150))
    dataset, out = download(files), tmp_path / "out"

    artifact = cache_vae(_section(bases[family]), dataset, out)

    assert artifact == read_artifact(out, LatentsArtifact)
    assert (artifact.num_samples, artifact.encoded, artifact.reused, artifact.skipped) == (4, 4, 0, ())
    assert artifact.tensors == {"latents": TensorSpec(dtype="fp32", shape=(4, None, 8))}
    made = load_family(bases[family].family)
    vae = made.load_vae(bases[family], torch.device("cpu"))
    samples = {sample.id: sample for sample in read_rows(dataset, "samples.jsonl", Sample)}
    rows = list(read_rows(out, "latents.jsonl", LatentRow))
    assert [row.sample for row in rows] == [f"a/{number:02}.png" for number in range(4)]
    assert {row.target_size for row in rows} == {(64, 64), (64, 128)}
    for row in rows:
        placement = Placement(row.intermediary_size, row.crop, row.target_size, row.bucket)
        pixels = to_pixels(open_picture(dataset / samples[row.sample].file), placement)
        generator = torch.Generator().manual_seed(int(row.key[:15], 16))
        noise = torch.randn(made.latent_shape(vae, *pixels.shape[1:]), generator=generator)
        expected = made.encode_pixels(vae, torch.stack([pixels] * BATCH), torch.stack([noise] * BATCH))[0]
        assert torch.equal(_latents(out)[row.key], expected)
        assert expected.shape == (4, row.target_size[1] // 8, row.target_size[0] // 8)


@pytest.mark.usefixtures("no_store")
@pytest.mark.parametrize("family", ["sdxl", "sana"])
def test_batch_size_changes_rounding_and_shards_nothing(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, family: str
) -> None:
    dataset = download(pictures("a", 5) | pictures("b", 6, start=5, size=(130, 64)))
    whole = cache_vae(_section(bases[family], "a", "b"), dataset, tmp_path / "whole")
    expected = _latents(tmp_path / "whole")
    for size in (1, 2, 16):
        section = _section(bases[family], "a", "b", vae_batch_size=size)
        assert cache_vae(section, dataset, tmp_path / f"b{size}").fingerprint == whole.fingerprint
        other = _latents(tmp_path / f"b{size}")
        assert other.keys() == expected.keys()
        for key, latents in expected.items():
            torch.testing.assert_close(other[key], latents, rtol=0, atol=1e-5)
    for num_shards in (2, 3, 5):
        found: dict[str, Tensor] = {}
        for shard in range(num_shards):
            part = tmp_path / f"{num_shards}-{shard}"
            made = cache_vae(_section(bases[family], "a", "b"), dataset, part, shard=shard, num_shards=num_shards)
            assert made.parents == whole.parents
            assert not found.keys() & _latents(part).keys()
            found |= _latents(part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.usefixtures("no_store")
def test_more_shards_than_samples(tmp_path: Path, bases: dict[str, ModelRef], download: Download) -> None:
    dataset, out = download(pictures("a", 1)), tmp_path / "out"

    artifact = cache_vae(_section(bases["sana"]), dataset, out, shard=1, num_shards=2)

    assert (artifact.num_samples, artifact.shards, artifact.tensors) == (0, (), {})
    assert list(read_rows(out, "latents.jsonl", LatentRow)) == []
    verify_files(out, artifact)


@pytest.mark.usefixtures("shared_store")
def test_only_what_is_new_is_encoded(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, caplog: pytest.LogCaptureFixture
) -> None:
    section = _section(bases["sana"])
    old = pictures("a", 4)
    first = cache_vae(section, download(old), tmp_path / "1")
    assert (first.encoded, first.reused) == (4, 0)
    assert cache_vae(section, download(old), tmp_path / "2") == first.model_copy(update={"encoded": 0, "reused": 4})

    more = cache_vae(section, download(old | pictures("a", 2, start=4)), tmp_path / "3")
    assert (more.encoded, more.reused, more.num_samples) == (2, 4, 6)

    renamed = {name.replace("a/00", "a/zz"): content for name, content in old.items()} | {"a/01.txt": "other words"}
    moved = cache_vae(section, download(renamed), tmp_path / "4")
    assert (moved.encoded, moved.reused) == (0, 4)
    assert moved.fingerprint != first.fingerprint
    assert {row.sample for row in read_rows(tmp_path / "4", "latents.jsonl", LatentRow)} == {
        "a/01.png", "a/02.png", "a/03.png", "a/zz.png"
    }  # fmt: skip

    caplog.set_level(logging.INFO)
    twins = cache_vae(section, download(old | {"a/twin.png": picture(9), "a/other.png": picture(9), "a/twin.txt": "x",
                                               "a/other.txt": "y"}), tmp_path / "5")  # fmt: skip
    assert (twins.encoded, twins.num_samples) == (1, 6)
    assert "cache_vae: 1/1 pictures" in caplog.text


@pytest.mark.usefixtures("shared_store")
def test_a_change_costs_what_it_touches(tmp_path: Path, bases: dict[str, ModelRef], download: Download) -> None:
    dataset = download(pictures("a", 2, size=(128, 128)) | pictures("b", 3, start=2, size=(128, 128)))
    ref = bases["sana"]
    base = _section(ref, "a", "b")
    first = cache_vae(base, dataset, tmp_path / "first")
    larger = Geometry(resolution=128, resolution_type="pixel", crop_style="center")
    sizes = (base.datasets[0], DatasetGeometry(id="b", geometry=larger))
    encoded = {
        "vae_batch_size": (base.model_copy(update={"vae_batch_size": 1}), 0),
        "resolution of b": (base.model_copy(update={"datasets": sizes}), 3),
        "dtype": (base.model_copy(update={"dtype": "bf16"}), 5),
        "seed": (base.model_copy(update={"seed": 1}), 5),
        "revision": (base.model_copy(update={"model": ref.model_copy(update={"revision": "s"})}), 5),
        "other vae": (base.model_copy(update={"model": ref.model_copy(update={"vae_revision": "v"})}), 5),
        "own vae by name": (base.model_copy(update={"model": ref.model_copy(update={"vae_path": ref.path})}), 0),
    }
    for name, (section, count) in encoded.items():
        artifact = cache_vae(section, dataset, tmp_path / name)
        assert (name, artifact.encoded, artifact.reused) == (name, count, 5 - count)
        assert (artifact.fingerprint == first.fingerprint) == (count == 0)
        assert cache_vae(section, dataset, tmp_path / name).encoded == 0


@pytest.mark.usefixtures("no_store")
def test_bf16_is_the_rounded_float32(tmp_path: Path, bases: dict[str, ModelRef], download: Download) -> None:
    dataset = download(pictures("a", 2))
    exact = cache_vae(_section(bases["sana"]), dataset, tmp_path / "fp32")
    half = cache_vae(_section(bases["sana"], dtype="bf16"), dataset, tmp_path / "bf16")

    assert (exact.tensors["latents"].dtype, half.tensors["latents"].dtype) == ("fp32", "bf16")
    assert half.shards[0].bytes < exact.shards[0].bytes
    pairs = zip(*(read_rows(tmp_path / dtype, "latents.jsonl", LatentRow) for dtype in ("fp32", "bf16")), strict=True)
    for one, other in pairs:
        latents = _latents(tmp_path / "bf16")[other.key]
        assert latents.dtype == torch.bfloat16
        assert torch.equal(latents, _latents(tmp_path / "fp32")[one.key].bfloat16())


@pytest.mark.usefixtures("no_store")
def test_the_posterior_is_sampled_for_each_picture(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download
) -> None:
    """Every picture has standard normal noise of its own, and another with another seed."""
    dataset = download(pictures("a", 6))
    made = load_family("sdxl")
    vae = made.load_vae(bases["sdxl"], torch.device("cpu"))
    shape = (1, *made.latent_shape(vae, 64, 64))
    noises = []
    for seed in (0, 1):
        cache_vae(_section(bases["sdxl"], seed=seed), dataset, tmp_path / f"{seed}")
        samples = {sample.id: sample for sample in read_rows(dataset, "samples.jsonl", Sample)}
        for row in read_rows(tmp_path / f"{seed}", "latents.jsonl", LatentRow):
            placement = Placement(row.intermediary_size, row.crop, row.target_size, row.bucket)
            pixels = to_pixels(open_picture(dataset / samples[row.sample].file), placement)[None]
            mean, above = (made.encode_pixels(vae, pixels, torch.full(shape, value)) for value in (0.0, 1.0))
            noises.append((_latents(tmp_path / f"{seed}")[row.key] - mean[0]) / (above - mean)[0])
    drawn = torch.stack(noises)
    assert drawn.mean().abs() < 0.07
    assert drawn.std() == pytest.approx(1, abs=0.05)
    correlations = torch.corrcoef(drawn.flatten(1)) - torch.eye(12)
    assert correlations.abs().max() < 0.3


@pytest.mark.usefixtures("no_store")
def test_pictures_that_are_too_small_are_named(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = download(pictures("a", 2, size=(100, 100)) | pictures("a", 1, start=7, size=(100, 80)))
    geometry = SMALL.model_copy(update={"minimum_image_size": 90.0})
    section = _section(bases["sana"]).model_copy(update={"datasets": (DatasetGeometry(id="a", geometry=geometry),)})

    artifact = cache_vae(section, dataset, tmp_path / "out")

    assert artifact.num_samples == artifact.encoded == 2
    assert [(skip.name, skip.reason) for skip in artifact.skipped] == [
        ("a/07.png", "100x80 pixels: an edge is below minimum_image_size 90 (pixel)")
    ]
    assert "skipped a/07.png: 100x80 pixels" in caplog.text


@pytest.mark.usefixtures("no_store")
def test_latents_that_are_not_finite_are_left_out_and_named(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, caplog: pytest.LogCaptureFixture
) -> None:
    """A VAE whose scaling factor takes the picture with the largest latents above float32."""
    files = pictures("a", 3) | {"a/99.png": picture(1), "a/99.txt": "the same picture as 01"}
    dataset = download(files)
    cache_vae(_section(bases["sana"]), dataset, tmp_path / "finite")
    rows = {row.sample: row for row in read_rows(tmp_path / "finite", "latents.jsonl", LatentRow)}
    config = json.loads((Path(bases["sana"].path) / "vae" / "config.json").read_text())
    sizes = {
        sample: float(_latents(tmp_path / "finite")[row.key].abs().max()) / config["scaling_factor"]
        for sample, row in rows.items()
    }
    *_, second, largest = sorted(set(sizes.values()))
    broken = tmp_path / "broken"
    shutil.copytree(bases["sana"].path, broken)
    factor = torch.finfo(torch.float32).max / ((second + largest) / 2)
    (broken / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": factor}))
    section = _section(bases["sana"].model_copy(update={"path": str(broken)}))

    artifact = cache_vae(section, dataset, tmp_path / "out")

    expected = sorted(sample for sample, size in sizes.items() if size == largest)
    assert [skip.name for skip in artifact.skipped] == expected
    assert {"not finite" in skip.reason for skip in artifact.skipped} == {True}
    assert all(f"skipped {name}: the VAE gave latents that are not finite" in caplog.text for name in expected)
    assert artifact.num_samples == 4 - len(expected)
    assert artifact.encoded == len(set(sizes.values())) - 1
    assert all(torch.isfinite(latents).all() for latents in _latents(tmp_path / "out").values())


@pytest.mark.parametrize("damage", ["missing", "changed"])
@pytest.mark.usefixtures("no_store")
def test_a_picture_that_is_not_what_was_downloaded_is_named(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, damage: str
) -> None:
    dataset, out = download(pictures("a", 3)), tmp_path / "out"
    cache_vae(_section(bases["sana"]), dataset, out)
    sample = list(read_rows(dataset, "samples.jsonl", Sample))[1]
    path = dataset / sample.file
    path.write_bytes(picture(8)) if damage == "changed" else path.unlink()

    with pytest.raises(ArtifactError, match=rf"{path}, the picture of a/01.png, is missing or damaged; run download"):
        cache_vae(_section(bases["sana"], seed=1), dataset, out)
    with pytest.raises(ArtifactError, match="did not finish"):
        read_artifact(out, LatentsArtifact)


@pytest.mark.usefixtures("no_store")
def test_a_damaged_list_of_samples_is_refused(tmp_path: Path, bases: dict[str, ModelRef], download: Download) -> None:
    dataset = download(pictures("a", 2))
    rows = dataset / "samples.jsonl"
    rows.write_text(rows.read_text().splitlines()[0] + "\n")

    with pytest.raises(ArtifactError, match=r"samples\.jsonl"):
        cache_vae(_section(bases["sana"]), dataset, tmp_path / "out")


def test_a_damaged_shard_is_encoded_again(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, shared_store: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "SAMPLES_PER_SHARD", 2)
    dataset, section = download(pictures("a", 5)), _section(bases["sdxl"], vae_batch_size=2)
    first = cache_vae(section, dataset, tmp_path / "first")
    whole = _files(shared_store)
    assert sorted(shard.samples for shard in first.shards) == [1, 2, 2]
    broken = next(shard for shard in first.shards if shard.samples == 2)
    path = Store(shared_store).path(broken.file)
    path.write_bytes(path.read_bytes()[:100])

    again = cache_vae(section, dataset, tmp_path / "again")

    assert broken.file in caplog.text
    assert again == first.model_copy(update={"encoded": 2, "reused": 3})
    assert _files(shared_store) == whole


def test_a_killed_run_is_completed_to_the_same_bytes(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLES_PER_SHARD", 2)
    dataset, section = download(pictures("a", 12) | pictures("b", 3, start=12, size=(128, 64))), _section(
        bases["sdxl"], "a", "b"
    )  # fmt: skip
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "whole"))
    started = time.monotonic()
    whole = cache_vae(section, dataset, tmp_path / "out")
    duration = time.monotonic() - started
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "killed"))
    chance = random.Random(0)
    for _ in range(6):
        child = fork(lambda: cache_vae(section, dataset, tmp_path / "killed out"))
        time.sleep(chance.uniform(0.2, 1) * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for latents in _latents(tmp_path / "killed", finished=False).values():
            assert torch.isfinite(latents).all()

    final = cache_vae(section, dataset, tmp_path / "killed out")

    assert final.encoded + final.reused == whole.encoded
    assert final == whole.model_copy(update={"encoded": final.encoded, "reused": final.reused})
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")


def test_two_runs_may_fill_one_store_at_once(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, shared_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLES_PER_SHARD", 2)
    dataset, section = download(pictures("a", 6)), _section(bases["sdxl"])

    children = [fork(lambda out=out: cache_vae(section, dataset, tmp_path / out)) for out in ("1", "2")]

    assert [wait(child) for child in children] == [0, 0]
    for out in ("1", "2"):
        artifact = read_artifact(tmp_path / out, LatentsArtifact)
        ShardReader(resolve_store(tmp_path / out)).verify(artifact.shards)
        assert artifact.num_samples == 6
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "alone"))
    cache_vae(section, dataset, tmp_path / "3")
    assert _files(shared_store) == _files(tmp_path / "alone")


BATCH = CacheVaeSection.model_fields["vae_batch_size"].default


def _section(ref: ModelRef, *datasets: str, **settings: object) -> CacheVaeSection:
    """Pictures of ``datasets`` ("a" by default) at 64 pixels."""
    geometries = tuple(DatasetGeometry(id=name, geometry=SMALL) for name in datasets or ("a",))
    return CacheVaeSection.model_validate({"model": ref, "datasets": geometries, **settings})


def _latents(root: Path, finished: bool = True) -> dict[str, Tensor]:
    """Key → latents of all shards below ``root``; with ``finished`` there is at least one shard."""
    shards = [load_file(path) for path in (root / "shards").glob("*.safetensors")]
    assert shards or not finished
    return {key.removesuffix(".latents"): latents for shard in shards for key, latents in shard.items()}


def _files(root: Path) -> dict[str, bytes]:
    """The finished files of a store or artifact."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
