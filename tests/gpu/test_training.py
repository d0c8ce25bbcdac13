"""Training on a GPU, with tiny models: bf16, resuming, memory, channels last, compiled kernels."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from kubetuner.config.compilation import CompileSettings
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.interruption import TerminatedError
from kubetuner.training.loop import Job, Outcome, train_denoiser
from kubetuner.training.saving import save_adapter, save_pipeline
from tests.unit.training.conftest import RandomBatches, Setup
from tests.unit.training.test_loop import terminate_at

FAMILIES = ("pixart_sigma", "sdxl", "sana")
LORA = LoraSettings(rank=2, alpha=4.0, dropout=0.0)


@pytest.mark.parametrize("model_type", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_in_bf16_gives_finite_losses_and_a_model(
    setup: Setup, tmp_path: Path, family: str, model_type: str
) -> None:
    lora = LORA if model_type == "lora" else None
    job = setup.job(family, RandomBatches(family), model_type=model_type, lora=lora, mixed_precision="bf16")

    outcome = train(job, tmp_path)

    assert outcome.steps == 6
    assert all(0.0 < point.loss < 100.0 for point in outcome.points)
    if lora is None:
        assert (save_pipeline(job, tmp_path) / "model_index.json").is_file()
    else:
        save_adapter(job, tmp_path / "adapter")
        assert list((tmp_path / "adapter").glob("*.safetensors"))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("model_type", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    setup: Setup, tmp_path: Path, family: str, model_type: str
) -> None:
    settings = {"model_type": model_type, "lora": LORA if model_type == "lora" else None}
    settings["checkpoint_step_interval"] = 3
    whole = setup.job(family, RandomBatches(family), **settings)
    expected = train(whole, tmp_path / "whole")
    # On a GPU batches are drawn up to three steps ahead.
    with pytest.raises(TerminatedError):
        train(setup.job(family, RandomBatches(family, act=terminate_at(3)), **settings), tmp_path / "parts")
    resumed = setup.job(family, RandomBatches(family), **settings)

    outcome = train(resumed, tmp_path / "parts")

    assert outcome.points == expected.points
    assert all(torch.equal(weight, resumed.trained()[name]) for name, weight in whole.trained().items())


def test_the_gpus_memory_is_told(setup: Setup, tmp_path: Path) -> None:
    outcome = train(setup.job("sana", RandomBatches("sana")), tmp_path)

    assert outcome.peak_memory_bytes == torch.cuda.max_memory_allocated()
    assert 0 < outcome.peak_memory_bytes < torch.cuda.get_device_properties(0).total_memory


def test_convolutions_of_sdxl_alone_are_channels_last(setup: Setup) -> None:
    for family in FAMILIES:
        denoiser = setup.job(family, RandomBatches(family)).denoiser
        kernels = [part.weight for part in denoiser.modules() if isinstance(part, torch.nn.Conv2d)]
        wide = [kernel for kernel in kernels if kernel.shape[1] > 1 and kernel.shape[2] > 1]
        last = [kernel.is_contiguous(memory_format=torch.channels_last) for kernel in wide]
        assert all(last) if family == "sdxl" else not any(last)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("model_type", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_inductors_kernels_train_alike(setup: Setup, tmp_path: Path, family: str, model_type: str) -> None:
    settings = {"model_type": model_type, "lora": LORA if model_type == "lora" else None, "mixed_precision": "bf16"}
    torch._dynamo.reset()
    plain = train(setup.job(family, RandomBatches(family), **settings), tmp_path / "plain")
    inductor = CompileSettings(backend="inductor")

    outcome = train(setup.job(family, RandomBatches(family), compilation=inductor, **settings), tmp_path / "compiled")

    losses = [point.loss for point in outcome.points]
    assert losses == pytest.approx([point.loss for point in plain.points], rel=0.05)
    assert outcome.graphs is not None
    assert 1 <= outcome.graphs.made <= 2
    assert outcome.graphs.unexpected == 0


def train(job: Job, folder: Path) -> Outcome:
    def log(_values: Mapping[str, float], _step: int) -> None: ...

    return train_denoiser(job, Checkpoints(folder, "key", 5), log)
