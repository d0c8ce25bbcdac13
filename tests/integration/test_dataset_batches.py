"""Datasets with batches of their own sizes and noise levels of their own, from the data file to a trained model.

One is encoded while training, one has masks, one keeps the base's answers. A run that is stopped goes on with the same
numbers, and two processes have those of one.
"""

import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kubetuner.artifacts import read_rows
from kubetuner.config.sections.steps import DatasetSampling, Sections
from kubetuner.data.batches import Batch, Batches
from kubetuner.families.on_demand import latent_maker
from kubetuner.steps.cache_text_embeds import cache_text_embeds
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from kubetuner.steps.train import _params, train
from kubetuner.training.checkpoints import LossPoint
from kubetuner.training.interruption import TerminatedError
from pipelines.recipes.demo.models import build_pipeline, write_pipeline
from tests.unit.steps.test_train_processes import _stop_at_a_checkpoint

STEPS = 30
CONFIG: dict[str, Any] = {
    "model_type": "lora", "model_family": "sana", "pretrained_model_name_or_path": "base", "lora_rank": 2,
    "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": STEPS, "learning_rate": 1e-3,
    "adam_epsilon": 1e-4, "checkpoint_step_interval": 2, "mixed_precision": "no", "gradient_checkpointing": False,
    "resolution": 64, "resolution_type": "pixel", "validation_resolution": 64, "seed": 7,
}  # fmt: skip
DATA: list[dict[str, Any]] = [
    {"id": "many", "instance_data_dir": "many", "train_batch_size": 3, "timestep_sampling_offset": 0.8,
     "vae_cache_disable": True},
    {"id": "masked", "instance_data_dir": "masked", "conditioning_data": "masks"},
    {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks"},
    {"id": "kept", "instance_data_dir": "many", "train_batch_size": 1, "is_regularisation_data": True},
    {"id": "held", "dataset_type": "eval", "instance_data_dir": "masked"},
]  # fmt: skip
SIZES = {"many": 3, "masked": 2, "kept": 1}


@dataclass(frozen=True)
class Prepared:
    """What the steps before ``train`` leave."""

    sections: Sections
    root: Path

    @property
    def caches(self) -> tuple[list[Path], list[Path]]:
        return [self.root / "latents"], [self.root / "texts"]

    def epoch(self) -> list[Batch]:
        """The first epoch's batches; two to an optimizer step."""
        section = self.sections.train
        with latent_maker(section.model, self.caches[0], self.root / "dataset", keep=True) as maker:
            source = Batches(section, *self.caches, ("embeds",), maker=maker)
            return [source.batch(*divmod(position, 2)) for position in range(source.batches_per_epoch)]

    def train(self, out: Path, **changes: object) -> None:
        train(self.sections.train.model_copy(update=changes), *self.caches, out, dataset=self.root / "dataset")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = tmp_path_factory.mktemp("prepared")
    write_pipeline(build_pipeline("sana", "unit"), root / "base")
    for folder, count in (("many", 7), ("masked", 5), ("masks", 5)):
        (root / folder).mkdir()
        for index in range(count):
            size = (64, 64) if index < 3 else (128, 64)
            Image.effect_noise(size, 80).convert("RGB").save(root / folder / f"picture_{index}.png")
    sections = make_plan(CONFIG, DATA, cwd=root).sections
    download_dataset(sections.download, root / "dataset")
    cache_vae(sections.cache_vae, root / "dataset", root / "latents")
    cache_text_embeds(sections.cache_text_embeds, root / "dataset", root / "texts")
    return Prepared(sections, root)


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "KUBETUNER_STORE", "KUBETUNER_CHECKPOINTS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "model"
    prepared.train(out)
    return out


def test_every_batch_is_of_its_datasets_size_with_its_masks_and_latents(prepared: Prepared) -> None:
    met: Counter[str] = Counter()
    for batch in prepared.epoch():
        dataset = batch.rows[0].dataset
        met[dataset] += 1
        assert len(batch.rows) == len(batch.latents) == SIZES[dataset]
        assert batch.latents.isfinite().all()
        assert (batch.masks is not None) is (dataset == "masked")
        assert batch.masks is None or len(batch.masks) == 2
    # 3 squares and 4 or 2 wide ones, in whole batches.
    assert met == {"many": 1 + 1, "masked": 1 + 1, "kept": 7}


def test_the_tracked_run_shows_what_datasets_have_of_their_own(prepared: Prepared) -> None:
    section = prepared.sections.train
    shown = _params(section, 1)
    assert shown["train_batch_size"] == "2"
    assert shown["dataset_train_batch_size"] == "many 3, kept 1"
    assert shown["dataset_timestep_sampling_offset"] == "many 0.8"
    plain = section.model_copy(update={"datasets": (DatasetSampling(id="many"),)})
    assert not [name for name in _params(plain, 1) if name.startswith("dataset_")]


def test_a_stopped_run_goes_on_bit_for_bit(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    teller = threading.Thread(target=_stop_at_a_checkpoint, args=(tmp_path,))
    teller.start()
    with pytest.raises(TerminatedError):
        prepared.train(tmp_path)
    teller.join()
    assert not (tmp_path / "artifact.json").exists()

    prepared.train(tmp_path)

    assert (tmp_path / "losses.jsonl").read_bytes() == (whole / "losses.jsonl").read_bytes()
    one, other = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, tmp_path))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_offset_changes_the_batches_of_its_dataset_alone(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    datasets = prepared.sections.train.datasets
    assert [one.timestep_sampling_offset for one in datasets] == [0.8, 0.0, 0.0]
    without = tuple(one.model_copy(update={"timestep_sampling_offset": 0.0}) for one in datasets)

    prepared.train(tmp_path, datasets=without, max_train_steps=5)

    differing = [one != other for one, other in zip(_losses(tmp_path), _losses(whole), strict=False)]
    first = next(place for place, batch in enumerate(prepared.epoch()) if batch.rows[0].dataset == "many")
    assert differing.index(True) == first // 2


def test_two_processes_have_the_losses_of_one(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    """Also where their batches of one step are of different sizes, and one of them asks the base."""
    prepared.train(tmp_path, num_train_processes=2, gradient_accumulation_steps=1)

    assert len(_losses(whole)) == STEPS
    assert _losses(tmp_path) == pytest.approx(_losses(whole), rel=1e-3)


def _losses(out: Path) -> list[float]:
    return [point.loss for point in read_rows(out, "losses.jsonl", LossPoint)]
