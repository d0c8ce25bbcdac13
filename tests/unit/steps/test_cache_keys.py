"""A change costs exactly what it touches: plan, download and both cache steps over one store."""

import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kubetuner.artifacts import LatentRow, LatentsArtifact, TextEmbedsArtifact, read_rows
from kubetuner.config.sections.steps import ModelRef, Sections
from kubetuner.data.batches import Batch, Batches
from kubetuner.errors import ConfigError
from kubetuner.families import load_family
from kubetuner.steps.cache_text_embeds import cache_text_embeds
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from kubetuner.store import Store
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.interruption import TerminatedError
from kubetuner.training.loop import Job, train_denoiser
from kubetuner.training.objective import Objective
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

Caches = tuple[LatentsArtifact, TextEmbedsArtifact]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unit pipelines of SDXL and Sana."""
    root = tmp_path_factory.mktemp("bases")
    for family in ("sdxl", "sana"):
        write_pipeline(build_pipeline(family, "unit"), root / family)
    return root


class Workplace:
    """Three pictures (the second one square), a copy of a base and an entry that may be changed, and one store."""

    def __init__(self, root: Path, base: Path) -> None:
        self.root, self.runs = root, 0
        self.entry: dict[str, object] = {
            "id": "a", "instance_data_dir": "pictures", "resolution": 64, "crop": True, "crop_style": "center",
            "crop_aspect": "square",
        }  # fmt: skip
        shutil.copytree(base, root / "base")
        (root / "pictures").mkdir()
        for index, name in enumerate(("red", "green", "blue")):
            Image.effect_noise((72, 64 + 8 * index), 80).convert("RGB").save(root / "pictures" / f"{name}.png")

    def sections(self, **settings: object) -> Sections:
        config = {
            "model_type": "full", "model_family": "sdxl", "pretrained_model_name_or_path": "base",
            "train_batch_size": 3, "max_train_steps": 4, **settings,
        }  # fmt: skip
        return make_plan(config, [self.entry], cwd=self.root).sections

    def run(self, **settings: object) -> Caches:
        self.runs += 1
        sections, out = self.sections(**settings), self.out
        download_dataset(sections.download, out / "dataset")
        latents = cache_vae(sections.cache_vae, out / "dataset", out / "latents")
        return latents, cache_text_embeds(sections.cache_text_embeds, out / "dataset", out / "texts")

    @property
    def out(self) -> Path:
        """Where the latest run's artifacts are."""
        return self.root / f"run{self.runs}"

    def change(self, part: str) -> None:
        """Other weights in a part of the base."""
        (file,) = (self.root / "base" / part).glob("*.safetensors")
        weights = {name: tensor * 1.5 for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def place(tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "store"))
    return Workplace(tmp_path, bases / "sdxl")


def encoded(caches: Caches) -> tuple[int, int]:
    """Encoded latents and texts; all others must have been found."""
    latents, texts = caches
    assert (latents.num_samples, texts.num_texts) == (3, 4)
    assert (latents.reused, texts.reused) == (3 - latents.encoded, 4 - texts.encoded)
    return latents.encoded, texts.encoded


def test_another_denoiser_or_name_encodes_nothing(place: Workplace) -> None:
    first = place.run()
    assert encoded(first) == (3, 4)
    before = place.sections()
    place.change("unet")
    changed = place.run()
    assert encoded(changed) == (0, 0)
    after = place.sections()
    assert after.train.model.revision != before.train.model.revision
    assert after.cache_vae == before.cache_vae  # Kubeflow does not even start the step.
    assert after.cache_text_embeds == before.cache_text_embeds
    (place.root / "base").rename(place.root / "elsewhere")
    moved = place.run(pretrained_model_name_or_path="elsewhere")
    assert encoded(moved) == (0, 0)
    assert [one.fingerprint for one in moved] == [one.fingerprint for one in first]


def test_another_vae_encodes_all_latents_and_no_text(place: Workplace) -> None:
    place.run()
    shutil.copytree(place.root / "base" / "vae", place.root / "same" / "vae")
    assert encoded(place.run(pretrained_vae_model_name_or_path="same")) == (0, 0)
    assert encoded(place.run(pretrained_vae_model_name_or_path="same/vae")) == (0, 0)
    place.change("vae")
    assert encoded(place.run()) == (3, 0)
    assert encoded(place.run(pretrained_vae_model_name_or_path="same")) == (0, 0)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_another_text_encoder_encodes_all_texts_and_no_latents(place: Workplace, part: str) -> None:
    place.run()
    place.change(part)
    assert encoded(place.run()) == (0, 4)


def test_what_an_empty_prompt_is_decides_texts_and_who_wrote_the_folder_does_not(place: Workplace) -> None:
    index = place.root / "base" / "model_index.json"
    place.run()
    index.write_text(index.read_text().replace('"_diffusers_version": "', '"_diffusers_version": "9'))
    assert encoded(place.run()) == (0, 0)
    assert '"force_zeros_for_empty_prompt": true' in index.read_text()
    index.write_text(index.read_text().replace('prompt": true', 'prompt": false'))
    assert encoded(place.run()) == (0, 4)


def test_a_new_picture_and_a_damaged_shard_cost_what_they_hold(
    place: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    place.run()
    Image.effect_noise((64, 64), 80).convert("RGB").save(place.root / "pictures" / "white.png")
    latents, texts = place.run()
    assert (latents.encoded, latents.reused, texts.encoded, texts.reused) == (1, 3, 1, 4)
    (small,) = [shard for shard in latents.shards if shard.samples == 1]
    file = place.root / "store" / "shards" / small.file
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    again, texts = place.run()
    assert (again.encoded, again.reused, texts.encoded) == (1, 3, 0)
    assert again.shards == latents.shards
    assert small.file in caplog.text


@pytest.mark.parametrize(
    ("changed", "latents"),
    [
        ({"crop_style": "corner"}, 2),  # The square picture is cut at the same place.
        ({"crop": False, "crop_aspect": "preserve"}, 0),  # The nearest sides that the model takes are 64 x 64 for all.
        ({"resolution": 128}, 3),
        ({"minimum_image_size": 64}, 0),
        ({"repeats": 3, "probability": 0.5}, 0),
    ],
    ids=str,
)
def test_another_shape_encodes_the_pictures_that_it_changes(
    place: Workplace, changed: dict[str, object], latents: int
) -> None:
    place.run()
    place.entry |= changed
    assert encoded(place.run()) == (latents, 0)


@pytest.mark.parametrize(
    ("changed", "texts"),
    [
        ({"instance_prompt": "a photo", "prepend_instance_prompt": True}, 3),
        ({"caption_shuffle": {"enable": False}}, 0),
    ],
    ids=str,
)
def test_other_captions_encode_their_texts_and_no_latents(
    place: Workplace, changed: dict[str, object], texts: int
) -> None:
    place.run()
    place.entry |= changed
    assert encoded(place.run()) == (0, texts)


def test_moving_pictures_between_datasets_encodes_nothing(place: Workplace) -> None:
    place.entry |= {"crop_style": "random"}
    place.run()
    (place.root / "pictures").rename(place.root / "albums")
    (place.root / "albums" / "deeper").mkdir()
    for name in ("red", "blue"):
        (place.root / "albums" / f"{name}.png").rename(place.root / "albums" / "deeper" / f"{name}.png")
    place.entry |= {"id": "other", "instance_data_dir": "albums"}
    assert encoded(place.run()) == (0, 0)


def test_a_run_claims_what_it_reuses(place: Workplace) -> None:
    place.run()
    store = Store(place.root / "store")
    for entry in store.entries():
        os.utime(place.root / "store" / entry.name, (1, 1))
    place.run()
    assert all(entry.touched > time.time() - 600 for entry in store.entries())


@pytest.mark.parametrize(
    ("one", "other", "same_vae", "same_text"),
    [
        ({"path": "org/a"}, {"path": "org/a"}, True, True),
        ({"path": "org/a"}, {"path": "org/b"}, False, False),
        ({"path": "org/a", "revision": "1"}, {"path": "org/a", "revision": "2"}, False, False),
        ({"path": "org/a", "vae_path": "org/v"}, {"path": "org/b", "vae_path": "org/v"}, True, False),
        ({"path": "org/a", "vae_path": "org/v"}, {"path": "org/a", "vae_path": "org/w"}, False, True),
        ({"path": "org/a", "vae_path": "org/a"}, {"path": "org/a"}, True, True),
        ({"path": "/x", "vae_revision": "v", "text_revision": "t"}, {"path": "/y", "vae_revision": "v"}, True, False),
        ({"path": "/x", "variant": "fp16"}, {"path": "/x"}, False, False),
    ],
)
def test_identities(one: Mapping[str, str], other: Mapping[str, str], same_vae: bool, same_text: bool) -> None:
    first, second = (ModelRef.model_validate({"family": "sdxl", **fields}) for fields in (one, other))
    assert (first.vae_identity() == second.vae_identity()) == same_vae
    assert (first.text_identity() == second.text_identity()) == same_text


def test_moments_are_kept_and_drawn_anew(place: Workplace) -> None:
    sampled, _ = place.run()
    plain = Batches(place.sections().train, [place.out / "latents"], [place.out / "texts"], ("embeds", "pooled"))
    kept, texts = place.run(vae_cache_moments=True)

    assert (kept.encoded, texts.encoded, set(kept.tensors)) == (3, 0, {"mean", "std"})
    assert sum(shard.bytes for shard in kept.shards) == pytest.approx(
        2 * sum(shard.bytes for shard in sampled.shards), rel=0.2
    )
    batches = Batches(place.sections().train, [place.out / "latents"], [place.out / "texts"], ("embeds", "pooled"))
    again = Batches(place.sections().train, [place.out / "latents"], [place.out / "texts"], ("embeds", "pooled"))
    first, second = _latents(batches, 0), _latents(batches, 1)
    assert first.keys() == second.keys() == _latents(plain, 0).keys()
    for sample in first:
        assert torch.equal(_latents(plain, 0)[sample], _latents(plain, 1)[sample])
        assert not torch.equal(first[sample], second[sample])
        assert torch.equal(second[sample], _latents(again, 1)[sample])  # A resumed run needs no state for it.
    assert len({value.sum().item() for value in first.values()}) == 3


def _latents(batches: Batches, step: int) -> dict[str, torch.Tensor]:
    batch = batches.batch(step, 0)
    return {row.sample: latents for row, latents in zip(batch.rows, batch.latents, strict=True)}


def test_the_seed_does_not_change_moments(place: Workplace) -> None:
    assert place.run(vae_cache_moments=True, seed=1)[0].encoded == 3
    assert place.run(vae_cache_moments=True, seed=2)[0].encoded == 0
    assert place.run(seed=2)[0].encoded == 3
    assert place.run(seed=1)[0].encoded == 3


def test_draws_have_the_posteriors_moments(place: Workplace) -> None:
    place.run(vae_cache_moments=True)
    batches = Batches(place.sections().train, [place.out / "latents"], [place.out / "texts"], ("embeds", "pooled"))
    (row,) = [row for row in read_rows(place.out / "latents", "latents.jsonl", LatentRow) if "red" in row.sample]
    stored = load_file(place.root / "store" / "shards" / row.shard)
    draws = torch.stack([_latents(batches, step)[row.sample] for step in range(400)])
    mean, std = stored[f"{row.key}.mean"], stored[f"{row.key}.std"]
    standard = (draws - mean) / std
    assert standard.mean(0).abs().max() < 5 / 400**0.5
    assert standard.std(0).sub(1).abs().max() < 5 / 800**0.5


def test_training_on_moments_resumes_exactly(place: Workplace) -> None:
    place.run(vae_cache_moments=True)
    section = place.sections(checkpoint_step_interval=1, learning_rate=1e-3, mixed_precision="no").train
    caches = [place.out / "latents"], [place.out / "texts"]

    class Interrupted(Batches):
        def batch(self, step: int, micro: int) -> Batch:
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(step, micro)

    def job() -> Job:
        denoiser = load_family("sdxl").load_denoiser(section.model, CPU, torch.float32)
        batches = Batches(section, *caches, ("embeds", "pooled"))
        process = load_family("sdxl").noise_process(section.model, section.process())
        objective = Objective(load_family("sdxl"), process, batches.null, section.seed, mixed_precision=False)
        return Job(section, denoiser, objective, batches, batches.epochs, 4, CPU)

    whole = train_denoiser(job(), Checkpoints(place.root / "whole", "key", 5), lambda _values, _step: None)
    interrupted = replace(job(), batches=Interrupted(section, *caches, ("embeds", "pooled")))
    parts = Checkpoints(place.root / "parts", "key", 5)
    with pytest.raises(TerminatedError):
        train_denoiser(interrupted, parts, lambda _values, _step: None)
    resumed = train_denoiser(job(), parts, lambda _values, _step: None)
    assert [point.loss for point in resumed.points] == [point.loss for point in whole.points]


@pytest.mark.parametrize("family", ["sdxl", "pixart_sigma", "sana"])
def test_moments_agree_with_samples(family: str, tmp_path: Path) -> None:
    write_pipeline(build_pipeline(family, "unit"), tmp_path)
    made, ref = load_family(family), ModelRef.model_validate({"family": family, "path": str(tmp_path)})
    vae = made.load_vae(ref, CPU)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = made.encode_moments(vae, pixels)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mean + std * noise, made.encode_pixels(vae, pixels, noise))
    torch.testing.assert_close(mean, made.encode_pixels(vae, pixels, None))


def test_sana_has_no_moments(tmp_path: Path, bases: Path) -> None:
    place = Workplace(tmp_path, bases / "sana")
    with pytest.raises(ConfigError, match="whose autoencoder gives one latent and no distribution"):
        place.sections(model_family="sana", vae_cache_moments=True)
