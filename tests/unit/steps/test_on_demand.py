"""Latents made while training, against latents that ``cache_vae`` made: the same bits, whatever happens meanwhile."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kubetuner.artifacts import LatentRow, LatentsArtifact, Sample, TextEmbedsArtifact, read_artifact, read_rows
from kubetuner.cli.step import run_step
from kubetuner.config.sections.steps import FamilyName, ModelRef, Sections
from kubetuner.data import kept_latents
from kubetuner.data.batches import Batch, Batches
from kubetuner.errors import ArtifactError, InputError
from kubetuner.evaluation.held_out import HeldOut, read_held_out
from kubetuner.families import load_family
from kubetuner.families.on_demand import LatentMaker, latent_maker
from kubetuner.steps.cache_text_embeds import cache_text_embeds
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from kubetuner.steps.train import train
from kubetuner.store import Store
from kubetuner.training.checkpoints import LossPoint
from tests.unit.steps.conftest import FAMILIES

SIZES = ((64, 64), (64, 64), (96, 64), (64, 64), (96, 64), (64, 64), (64, 64), (96, 64), (64, 64), (64, 64))


@dataclass(frozen=True)
class Caches:
    """What the steps before ``train`` left."""

    sections: Sections
    dataset: Path  # The pictures set aside.
    latents: Path
    texts: Path

    def batches(self, count: int = 8, processes: int = 1, maker: LatentMaker | None = None) -> list[Batch]:
        """The first batches of one process."""
        tensors = load_family(self.sections.train.model.family).facts.text_tensors
        made = Batches(self.sections.train, [self.latents], [self.texts], tensors, processes, maker)
        return [made.batch(step, 0) for step in range(count)]

    def made(self, **settings: int) -> list[Batch]:
        """As :meth:`batches`, with latents made meanwhile where the cache has none."""
        with latent_maker(self.model, [self.latents], self.dataset, keep=True) as maker:
            return self.batches(maker=maker, **settings)

    def held_out(self) -> HeldOut:
        tensors = load_family(self.model.family).facts.text_tensors
        found = read_held_out(self.sections.evaluate, [self.latents], [self.texts], tensors, self.dataset)
        assert found is not None
        return found

    @property
    def model(self) -> ModelRef:
        return self.sections.train.model


@dataclass(frozen=True)
class Place:
    """Pictures of two sizes, some twice, masks for some, and pictures held out."""

    root: Path
    base: ModelRef

    def write(self) -> None:
        for folder, sizes in (("pictures", SIZES), ("others", SIZES[:4]), ("held", SIZES[:3])):
            (self.root / folder).mkdir()
            for index, (width, height) in enumerate(sizes):
                # A random crop has something to choose from.
                noise = np.random.default_rng([len(folder), index]).integers(0, 256, (height + 9, width + 17, 3))
                Image.fromarray(noise.astype(np.uint8)).save(self.root / folder / f"{index:02}.png")
                (self.root / folder / f"{index:02}.txt").write_text(f"{folder} {index}")
        shutil.copy(self.root / "pictures/03.png", self.root / "pictures/10.png")
        (self.root / "pictures/10.txt").write_text("the same again")

    def caches(self, out: str, keys: Mapping[str, object], *entries: Mapping[str, object]) -> Caches:
        """Run the steps before ``train`` with ``keys`` in config.json."""
        config = {
            "model_type": "full", "model_family": self.base.family, "pretrained_model_name_or_path": self.base.path,
            "resolution": 64, "resolution_type": "pixel", "max_train_steps": 6, "train_batch_size": 2, "seed": 3,
            "learning_rate": 1e-3, "validation_num_inference_steps": 2, "mixed_precision": "no", **keys,
        }  # fmt: skip
        data = [
            {"id": "a", "instance_data_dir": "pictures", **_CROP},
            {"id": "held", "dataset_type": "eval", "instance_data_dir": "held", **_CROP},
        ]
        data = [{"caption_strategy": "textfile", **entry} for entry in (*data, *entries)]
        sections = make_plan(config, data, cwd=self.root).sections
        folder = self.root / out
        download_dataset(sections.download, folder / "dataset", folder / "pictures")
        cache_vae(sections.cache_vae, folder / "dataset", folder / "latents")
        cache_text_embeds(sections.cache_text_embeds, folder / "dataset", folder / "texts")
        return Caches(sections, folder / "pictures", folder / "latents", folder / "texts")

    def train(self, caches: Caches, out: str, **settings: object) -> bytes:
        """The losses of a run."""
        section = caches.sections.train.model_copy(update=settings)
        train(section, [caches.latents], [caches.texts], self.root / out, dataset=caches.dataset)
        return (self.root / out / "losses.jsonl").read_bytes()


_CROP = {"crop": True, "crop_aspect": "preserve", "crop_style": "random"}
ONDEMAND, DISABLE, MOMENTS = {"vae_cache_ondemand": True}, {"vae_cache_disable": True}, {"vae_cache_moments": True}


@pytest.fixture
def place(tmp_path: Path, bases: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("KUBETUNER_CHECKPOINTS", raising=False)
    return _place(tmp_path, bases, "sdxl", monkeypatch)


def _place(root: Path, bases: dict[str, ModelRef], family: FamilyName, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(root, bases[family])
    made.write()
    _store(root, "store", monkeypatch)
    return made


def _store(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("KUBETUNER_STORE", str(root / name))
    return Store(root / name)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_made_on_demand_is_what_the_cache_would_hold(
    tmp_path: Path, bases: dict[str, ModelRef], family: FamilyName, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = _place(tmp_path, bases, family, monkeypatch)
    cached = place.caches("cached", {})
    expected, held = cached.batches(), cached.held_out()
    store = _store(tmp_path, "other", monkeypatch)
    left = place.caches("left", ONDEMAND)
    artifact = read_artifact(left.latents, LatentsArtifact)
    assert (artifact.encoded, artifact.left, artifact.shards) == (0, 14, ())
    assert not store.entries(artifact.on_demand.namespace if artifact.on_demand else "")

    with latent_maker(left.model, [left.latents], left.dataset, keep=True) as maker:
        assert maker is not None
        made = left.batches(maker=maker)
        # More than an epoch, and no picture twice; those held out are not trained on.
        assert maker.encoded <= 10

    _same(made, expected)
    _same_held_out(left.held_out(), held)
    with latent_maker(left.model, [left.latents], left.dataset, keep=True) as maker:
        assert maker is not None
        _same(left.batches(maker=maker), expected)
        assert maker.encoded == 0


@pytest.mark.parametrize("family", ["pixart_sigma", "sdxl"])
def test_without_a_cache_every_use_draws_what_cached_moments_would_give(
    tmp_path: Path, bases: dict[str, ModelRef], family: FamilyName, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = _place(tmp_path, bases, family, monkeypatch)
    moments = place.caches("moments", MOMENTS)
    expected, held = moments.batches(), moments.held_out()
    store = _store(tmp_path, "other", monkeypatch)
    left = place.caches("left", DISABLE)
    before = [entry.name for entry in store.entries()]

    made = left.made()

    _same(made, expected)
    _same_held_out(left.held_out(), held)
    assert [entry.name for entry in store.entries()] == before
    uses = [batch.latents[0] for batch in made for row in batch.rows[:1] if row.sample == made[0].rows[0].sample]
    uses += [batch.latents[1] for batch in made for row in batch.rows[1:] if row.sample == made[0].rows[0].sample]
    assert len(uses) > 1
    assert not torch.equal(uses[0], uses[1])


def test_sana_without_a_cache_has_the_latents_of_the_cache(
    tmp_path: Path, bases: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = _place(tmp_path, bases, "sana", monkeypatch)
    _same(place.caches("left", DISABLE).made(), place.caches("cached", {}).batches())


def test_kept_moments_are_those_of_the_cache(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = place.caches("cached", MOMENTS).batches()
    _store(place.root, "other", monkeypatch)
    left = place.caches("left", MOMENTS | ONDEMAND)

    _same(left.made(), expected)
    _same(left.made(), expected)


def test_losses_are_those_of_the_cache_and_a_second_run_encodes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = place.train(place.caches("cached", {}), "first")
    _store(place.root, "other", monkeypatch)
    monkeypatch.setattr(kept_latents, "SAMPLES_PER_SHARD", 4)
    left = place.caches("left", ONDEMAND)
    caplog.set_level(logging.INFO)

    assert place.train(left, "second") == expected
    assert "The latents of 14 pictures are not cached: the VAE, on cpu, makes them" in caplog.text
    assert "Latents made when they were needed: 10 pictures in" in caplog.text
    caplog.clear()
    assert place.train(left, "third") == expected
    assert "Latents made when they were needed: 0 pictures in" in caplog.text


@pytest.mark.parametrize("keys", [ONDEMAND, DISABLE], ids=["ondemand", "disable"])
def test_a_run_that_stopped_goes_on_bit_for_bit(
    place: Place, keys: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture of a later batch is damaged, which stops the run; it is put right, and the run goes on."""
    left = place.caches("left", keys)
    expected = place.train(left, "whole")
    _store_with_texts(place, left, "other", monkeypatch)
    late = {row.sample: row for batch in left.made()[2:] for row in batch.rows}
    for batch in left.made()[:2]:
        for row in batch.rows:
            late.pop(row.sample, None)
    row = next(iter(late.values()))
    picture, aside = left.dataset / row.picture, place.root / "aside"
    _store_with_texts(place, left, "third", monkeypatch)
    picture.rename(aside)
    monkeypatch.setattr("kubetuner.data.batches.BATCHES_AHEAD", 1)

    with pytest.raises(ArtifactError, match=f"the picture of {row.sample}, is missing or damaged"):
        place.train(left, "parts", checkpoint_step_interval=1)
    assert list((place.root / "parts/checkpoints").glob("*/checkpoint-*"))
    aside.rename(picture)

    assert _losses(place.train(left, "parts", checkpoint_step_interval=1)) == _losses(expected)


def test_a_dataset_beside_a_cached_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder at two resolutions, another folder for regularisation with masks; some cached, some not."""
    (place.root / "masks").mkdir()
    for index in range(4):
        Image.linear_gradient("L").resize((SIZES[index][0] + 17, SIZES[index][1] + 9)).save(
            place.root / "masks" / f"{index:02}.png"
        )
    larger = {"id": "larger", "instance_data_dir": "pictures", "resolution": 128, **_CROP}
    others = {"id": "others", "instance_data_dir": "others", "conditioning_data": "masks", **_CROP}
    others |= {"is_regularisation_data": True}
    masks = {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks"}
    lora = {"model_type": "lora", "lora_rank": 2}
    cached = place.caches("cached", lora, larger, others, {**masks, "caption_strategy": None})
    expected = cached.batches(count=12)
    losses = place.train(cached, "first")
    store = _store(place.root, "other", monkeypatch)
    left = place.caches("left", lora, larger | ONDEMAND, others | ONDEMAND, {**masks, "caption_strategy": None})
    artifact = read_artifact(left.latents, LatentsArtifact)
    assert (artifact.encoded, artifact.left) == (13, 15)

    _same(left.made(count=12), expected)
    assert any(batch.masks is not None for batch in expected)
    assert place.train(left, "second") == losses
    assert artifact.on_demand is not None
    entries = map(store.read_entry, store.entries(artifact.on_demand.namespace))
    kept = {key for entry in entries if entry is not None for key in entry.keys}
    rows = {row.sample: row for row in read_rows(left.latents, "latents.jsonl", LatentRow)}
    assert {batch_row.key for batch in expected for batch_row in batch.rows} <= kept
    assert {row.dataset for row in rows.values() if row.picture} == {"larger", "others"}


def test_processes_find_what_others_have_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two take turns; at a new epoch each finds the other's shards."""
    expected = place.caches("cached", {}).batches(count=10)
    _store(place.root, "other", monkeypatch)
    monkeypatch.setattr(kept_latents, "SAMPLES_PER_SHARD", 1)
    left = place.caches("left", ONDEMAND)
    tensors = load_family("sdxl").facts.text_tensors
    with (
        latent_maker(left.model, [left.latents], left.dataset, keep=True) as one,
        latent_maker(left.model, [left.latents], left.dataset, keep=True) as other,
    ):
        assert one is not None
        assert other is not None
        made = [Batches(left.sections.train, [left.latents], [left.texts], tensors, 2, maker) for maker in (one, other)]
        _same([made[place % 2].batch(place // 2, place % 2) for place in range(10)], expected)
        assert one.encoded + other.encoded <= 12  # Of 10 different pictures.


def test_two_processes_train_as_one(place: Place) -> None:
    left, settings = place.caches("left", DISABLE), {"max_train_steps": 3, "adam_epsilon": 1e-4}
    alone = place.train(left, "alone", gradient_accumulation_steps=2, num_train_processes=1, **settings)

    two = place.train(left, "two", gradient_accumulation_steps=1, num_train_processes=2, **settings)

    assert _losses(two) == pytest.approx(_losses(alone), rel=1e-4)


def test_what_cannot_be_done_is_said(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = place.caches("left", DISABLE)
    section = left.sections.train

    with pytest.raises(ArtifactError, match="leaves latents to be made of pictures, and no dataset was given"):
        train(section, [left.latents], [left.texts], tmp_path / "out")
    with pytest.raises(ArtifactError, match="leaves latents to be made, and nothing was given to make them"):
        left.batches()
    (place.root / "pictures/11.png").write_bytes((place.root / "pictures/01.png").read_bytes())
    (place.root / "pictures/11.txt").write_text("more")
    newer = place.caches("newer", DISABLE)
    with pytest.raises(ArtifactError, match="was made of another dataset than"):
        train(section, [left.latents], [left.texts], tmp_path / "out", dataset=newer.dataset)
    monkeypatch.delenv("KUBETUNER_STORE")
    with pytest.raises(InputError, match=r"vae_cache_ondemand keeps .* \(a, held\) in the store, and KUBETUNER_STORE"):
        place.caches("ondemand", ONDEMAND)


def test_pictures_that_training_reads_are_set_aside_and_no_others(place: Place) -> None:
    left = place.caches("left", {}, {"id": "others", "instance_data_dir": "others", **_CROP, **DISABLE})
    both = place.root / "left"

    def kept(folder: str) -> set[str]:
        return {path.relative_to(both / folder).as_posix() for path in (both / folder / "files").rglob("*.png")}

    samples = list(read_rows(both / "dataset", "samples.jsonl", Sample))
    assert kept("pictures") == {sample.file for sample in samples if sample.dataset == "others"}
    assert kept("dataset") == {sample.file for sample in samples if sample.dataset != "others"}
    again = left.sections.download.model_copy(update={"on_demand": ()})
    download_dataset(again, both / "dataset", both / "pictures")
    assert kept("pictures") == set()
    assert kept("dataset") == {sample.file for sample in samples}


def test_the_plan_says_what_is_left_to_training(place: Place) -> None:
    config = {
        "model_type": "full", "model_family": "sdxl", "pretrained_model_name_or_path": place.base.path,
        "resolution": 64, "resolution_type": "pixel", "max_train_steps": 1, "train_batch_size": 2,
    }  # fmt: skip
    entry = {"caption_strategy": "textfile", "instance_data_dir": "pictures"}
    cached = make_plan(config, [{**entry, "id": "a"}], cwd=place.root)
    mixed = make_plan(config, [{**entry, "id": "a"}, {**entry, "id": "b", **DISABLE}], cwd=place.root)
    kept = make_plan(config, [{**entry, "id": "a"}, {**entry, "id": "b", **ONDEMAND}], cwd=place.root)

    assert "holds the VAE" not in cached.markdown
    assert (
        "The latents of `b` (11 pictures) are made at every use and not kept (`vae_cache_disable`)." in mixed.markdown
    )
    assert "`train` then holds the VAE on its GPU too" in mixed.markdown
    assert "kept in the store, for which KUBETUNER_STORE must be set" in kept.markdown
    assert cached.summary["latents_bytes"] == mixed.summary["latents_bytes"]
    assert kept.summary["latents_bytes"] == 2 * int(str(cached.summary["latents_bytes"]))


def test_a_damaged_picture_is_named(place: Place) -> None:
    left = place.caches("left", DISABLE)
    row = left.made(count=1)[0].rows[0]
    path = left.dataset / row.picture
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(ArtifactError, match=f"{path}, the picture of {row.sample}, is missing or damaged"):
        left.made()


def test_latents_that_are_not_finite_are_named_and_not_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    left = place.caches("left", ONDEMAND)
    with latent_maker(left.model, [left.latents], left.dataset, keep=True) as maker:
        assert maker is not None
        with torch.no_grad():
            next(maker._encoder.vae.parameters()).fill_(float("nan"))
        with pytest.raises(ArtifactError, match=r"a/\d\d.png: the VAE gave latents that are not finite"):
            left.batches(maker=maker)
        assert maker.kept is not None
        assert not maker.kept._waiting


def test_the_step_takes_the_dataset_by_the_command_line(place: Place, tmp_path: Path) -> None:
    left = place.caches("left", DISABLE | {"max_train_steps": 1})
    (tmp_path / "sections.json").write_text(left.sections.to_json())
    caches = [f"latents={left.latents}", f"text_embeds={left.texts}"]

    run_step("train", tmp_path / "sections.json", [*caches, f"dataset={left.dataset}"], tmp_path / "model")
    inputs = [*caches, f"model={tmp_path / 'model'}", f"dataset={left.dataset}"]
    run_step("evaluate", tmp_path / "sections.json", inputs, tmp_path / "report")

    assert "14 pictures: 0 encoded, 0 reused, 14 left to training" in (tmp_path / "report/report.html").read_text()


def _same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert [row.sample for row in one.rows] == [row.sample for row in other.rows]
        assert torch.equal(one.latents, other.latents)
        assert (one.masks is None) == (other.masks is None)
        assert one.masks is None or other.masks is None or torch.equal(one.masks, other.masks)


def _same_held_out(found: HeldOut, expected: HeldOut) -> None:
    assert [sample.row.sample for sample in found.samples] == [sample.row.sample for sample in expected.samples]
    for one, other in zip(found.samples, expected.samples, strict=True):
        assert torch.equal(one.latents, other.latents)


def _losses(rows: bytes) -> list[float]:
    return [LossPoint.model_validate(json.loads(line)).loss for line in rows.splitlines()]


def _store_with_texts(place: Place, caches: Caches, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that holds nothing but text embeddings."""
    _store(place.root, name, monkeypatch)
    (place.root / name / "shards").mkdir(parents=True)
    for shard in read_artifact(caches.texts, TextEmbedsArtifact).shards:
        shutil.copy2(place.root / "store/shards" / shard.file, place.root / name / "shards" / shard.file)
