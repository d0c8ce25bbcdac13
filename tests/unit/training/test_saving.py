from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.steps import ModelRef
from kubetuner.errors import TrainingError
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.loop import Job, train_denoiser
from kubetuner.training.saving import save_adapter, save_pipeline
from tests.unit.training.conftest import RandomBatches, Setup

FAMILIES = ("pixart_sigma", "sdxl", "sana")
KINDS = {
    "lora": LoraSettings(rank=2, alpha=4.0, dropout=0.3),
    "dora": LoraSettings(rank=2, alpha=4.0, dropout=0.3, use_dora=True),
    "pissa": LoraSettings(rank=2, alpha=2.0, dropout=0.0, init_type="pissa"),
    "lokr": LoraSettings(algorithm="lokr", rank=10000, alpha=10000.0, factor=4, target_classes=("Attention",)),
    "loha": LoraSettings(algorithm="loha", rank=2, alpha=1.0, target_classes=("Attention",)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_predicts_as_trained(setup: Setup, tmp_path: Path, family: str, kind: str) -> None:
    job = _trained(setup, family, tmp_path, model_type="lora", lora=KINDS[kind], max_train_steps=3)

    save_adapter(job, tmp_path / "adapter")

    assert list((tmp_path / "adapter").glob("*.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_loads_otherwise_is_refused(setup: Setup, tmp_path: Path, kind: str) -> None:
    job = _trained(setup, "sana", tmp_path, model_type="lora", lora=KINDS[kind], max_train_steps=1)
    unsaved = next(parameter for parameter in job.denoiser.parameters() if not parameter.requires_grad)
    with torch.no_grad():
        unsaved.add_(1.0)

    with pytest.raises(TrainingError, match="does not load as it was trained"):
        save_adapter(job, tmp_path / "adapter")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_pipeline_has_the_trained_weights(setup: Setup, tmp_path: Path, family: str) -> None:
    job = _trained(setup, family, tmp_path, model_type="full", lora=None)

    folder = save_pipeline(job, tmp_path)

    ref = ModelRef.model_validate({"family": family, "path": str(folder)})
    loaded = job.objective.family.load_denoiser(ref, job.device, torch.float32).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in job.denoiser.state_dict().items())
    assert (folder / "model_index.json").is_file()
    assert not list(folder.rglob("*.bin"))


def test_channels_last_changes_the_memory_layout_alone(setup: Setup, tmp_path: Path) -> None:
    """What a GPU does to SDXL's weights, done here: same losses and checkpoints, and a pipeline as ever."""
    settings = {"model_type": "full", "lora": None, "mixed_precision": "no", "learning_rate": 1e-3}
    points, weights = [], []
    for name, layout in (("plain", torch.contiguous_format), ("last", torch.channels_last)):
        job = setup.job("sdxl", RandomBatches("sdxl"), checkpoint_step_interval=3, **settings)
        job.denoiser.to(memory_format=layout)
        outcome = train_denoiser(job, Checkpoints(tmp_path / name, "key", 2), lambda _values, _step: None)
        points.append([point.loss for point in outcome.points])
        weights.append(load_file(save_pipeline(job, tmp_path / name) / "unet/diffusion_pytorch_model.safetensors"))
    assert points[0] == pytest.approx(points[1], rel=1e-4)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-3)  # Six steps of 1e-3.


def _trained(setup: Setup, family: str, folder: Path, **settings: object) -> Job:
    job = setup.job(family, RandomBatches(family), **settings)
    train_denoiser(job, Checkpoints(folder / "checkpoints", "key", 1), lambda _values, _step: None)
    return job
