"""The steps over a store in a bucket do what they do over a folder."""

import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kubetuner.artifacts import LatentsArtifact, ModelArtifact, ShardEntry, TextEmbedsArtifact
from kubetuner.cli import main as command
from kubetuner.config.sections.steps import Sections
from kubetuner.errors import ArtifactError, ConfigError
from kubetuner.evaluation.held_out import read_held_out
from kubetuner.steps import cache_text_embeds as texts_step
from kubetuner.steps import cache_vae as latents_step
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from kubetuner.steps.train import train
from pipelines.recipes.demo.models import build_pipeline, write_pipeline
from tests.servers.faults import FaultyProxy
from tests.unit.conftest import fetchers_end

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

PREFIX = "team/store"
CONFIG = {
    "model_type": "lora", "model_family": "sana", "pretrained_model_name_or_path": "base", "lora_rank": 2,
    "train_batch_size": 3, "max_train_steps": 6, "vae_batch_size": 4, "caption_dropout_probability": 0.2,
    "report_to": "none",
}  # fmt: skip
DATA = [
    {"id": "a", "instance_data_dir": "pictures", "resolution": 64, "resolution_type": "pixel", "crop": True,
     "crop_aspect": "square", "caption_strategy": "textfile"},
    {"id": "held", "dataset_type": "eval", "instance_data_dir": "held", "resolution": 64, "resolution_type": "pixel",
     "crop": True, "crop_aspect": "square", "caption_strategy": "textfile"},
]  # fmt: skip


class Workplace:
    """Pictures, a base, and what the steps make of them below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write_pipeline(build_pipeline("sana", "unit"), root / "base")
        for folder, count in (("pictures", 12), ("held", 2)):
            (root / folder).mkdir()
            for index in range(count):
                Image.effect_noise((64, 64), 50 + index).convert("RGB").save(root / folder / f"{index:02}.png")
                (root / folder / f"{index:02}.txt").write_text(f"{folder} {index}")
        self.sections: Sections = make_plan(CONFIG, DATA, cwd=root).sections
        download_dataset(self.sections.download, root / "dataset")

    def cache(self, out: str) -> tuple[LatentsArtifact, TextEmbedsArtifact]:
        dataset, out_folder = self.root / "dataset", self.root / out
        return (
            latents_step.cache_vae(self.sections.cache_vae, dataset, out_folder / "latents"),
            texts_step.cache_text_embeds(self.sections.cache_text_embeds, dataset, out_folder / "texts"),
        )

    def inputs(self, out: str) -> tuple[list[Path], list[Path]]:
        return [self.root / out / "latents"], [self.root / out / "texts"]

    def train(self, out: str) -> tuple[ModelArtifact, bytes]:
        model = train(self.sections.train, *self.inputs(out), self.root / out / "model")
        return model, (self.root / out / "model" / "losses.jsonl").read_bytes()


@pytest.fixture
def place(proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """Shards of four samples, so that there are several."""
    monkeypatch.setattr(latents_step, "SAMPLES_PER_SHARD", 4)
    monkeypatch.setattr(texts_step, "TEXTS_PER_SHARD", 4)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Workplace(tmp_path)


def shards(caches: tuple[LatentsArtifact, TextEmbedsArtifact]) -> list[ShardEntry]:
    return [shard for artifact in caches for shard in artifact.shards]


def test_everything_is_equal_and_found_again(
    place: Workplace, bucket: Any, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pattern in ("POST .*uploadType", r"GET .*/o\?", "GET .*alt=media"):
        proxy.fail(pattern, "status", 503)
    far = place.cache("far")
    assert (far[0].encoded, far[0].reused, far[1].encoded) == (14, 0, 15)
    model, losses = place.train("far")
    held_out = read_held_out(place.sections.evaluate, *place.inputs("far"), ("embeds",))
    assert all(rule.times == 0 for rule in proxy.faults)
    again = place.cache("again")
    assert (again[0].encoded, again[0].reused, again[1].encoded) == (0, 14, 0)

    monkeypatch.setenv("KUBETUNER_STORE", str(place.root / "folder"))
    near = place.cache("near")
    assert near == far
    assert place.train("near") == (model, losses)
    again_held_out = read_held_out(place.sections.evaluate, *place.inputs("near"), ("embeds",))
    assert held_out is not None
    assert again_held_out is not None
    assert [str(one) for one in held_out.samples] == [str(one) for one in again_held_out.samples]
    stored = {path.name: path.read_bytes() for path in (place.root / "folder" / "shards").iterdir()}
    found = bucket.list_blobs(prefix=f"{PREFIX}/shards/")
    assert {blob.name.rpartition("/")[2]: blob.download_as_bytes() for blob in found} == stored
    assert len(stored) >= 7


def test_a_mirror_that_holds_two_shards_is_enough(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caches = place.cache("one")
    whole = place.train("one")[1]
    mirror = place.root / "small"
    monkeypatch.setenv("KUBETUNER_STORE_CACHE", str(mirror))
    largest = max(shard.bytes for shard in shards(caches))
    monkeypatch.setenv("KUBETUNER_STORE_CACHE_GIB", str(2.1 * largest / 2**30))
    monkeypatch.setattr("kubetuner.data.encoded_samples.MEMORY_BUDGET_BYTES", 0)
    (place.root / "one" / "model").rename(place.root / "first-model")
    assert place.train("one")[1] == whole
    fetchers_end()
    assert sum(path.stat().st_size for path in mirror.iterdir()) <= 2.1 * largest
    assert "one batch reads shards of" in caplog.text
    assert "better as much as all shards" in caplog.text


def test_a_damaged_object_stops_training_and_is_encoded_again(
    place: Workplace, bucket: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = place.cache("one")
    broken = caches[0].shards[0]
    bucket.blob(f"{PREFIX}/shards/{broken.file}").upload_from_string(b"damaged")
    with pytest.raises(ArtifactError, match=rf"{broken.file} is damaged: it has 7 bytes.*run cache_vae"):
        place.train("one")
    with pytest.raises(SystemExit) as verified:
        command.main(["cache", "verify"])
    assert verified.value.code == 1
    assert (
        f"damaged: gs://store-bucket/{PREFIX}/shards/{broken.file} ({broken.samples} samples)"
        in capsys.readouterr().err
    )
    with caplog.at_level(logging.WARNING):
        mended = place.cache("two")
    assert (mended[0].encoded, mended[0].reused) == (broken.samples, 14 - broken.samples)
    assert mended[0].shards == caches[0].shards
    place.train("two")
    for arguments in (["cache", "verify"], ["cache", "ls"], ["cache", "gc", "--keep", str(place.root / "one")]):
        with pytest.raises(SystemExit) as done:
            command.main(arguments)
        assert not done.value.code
    shown = capsys.readouterr().out
    assert f"{len(shards(caches))} shards are whole" in shown
    assert "removed 0 files" in shown


@pytest.mark.parametrize(
    ("address", "fault", "words"),
    [
        ("gs://absent/store", None, r"there is no such bucket \(404\); check KUBETUNER_STORE"),
        ("gs://store-bucket/x", r"GET .*/o\?", "listing .* access is denied .* Storage Object User"),
        ("gs://store-bucket/x", "POST .*uploadType", "writing .* access is denied .* Storage Object User"),
        ("gs://store-bucket/x", "DELETE ", "objects cannot be removed .* Storage Object User"),
        ("gs://", None, "no address like gs://bucket/prefix"),
        ("s3://store-bucket/x", None, "a store is a folder or gs://bucket/prefix, and s3://store-bucket/x is neither"),
    ],
)
def test_plan_finds_out_whether_the_store_can_be_used(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, fault: str | None, words: str
) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / f"{name}.png")
    config = {"model_type": "full", "model_family": "pixart_sigma", "train_batch_size": 2, "max_train_steps": 2}
    data = [{"id": "a", "instance_data_dir": "pictures", "resolution": 64, "resolution_type": "pixel"}]
    make_plan(config, data, cwd=tmp_path)
    monkeypatch.setenv("KUBETUNER_STORE", address)
    if fault:
        proxy.fail(fault, "status", 403, times=99)
    with pytest.raises(ConfigError, match=rf"1 problem .*\n.*KUBETUNER_STORE: is '{address}'; .*{words}"):
        make_plan(config, data, cwd=tmp_path)
