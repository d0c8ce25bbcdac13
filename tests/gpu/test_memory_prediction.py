"""The predicted peak against ``torch.cuda.max_memory_allocated``, at the published layer sizes; needs an NVIDIA GPU."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kubetuner.config.models import OUTLINES
from kubetuner.config.precision import missing_library
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.steps import DatasetSampling, ModelRef, TrainSection
from kubetuner.families import load_family
from kubetuner.families.architectures import outline_denoiser
from kubetuner.families.attention import use_attention
from kubetuner.families.quantised import quantise
from kubetuner.training.denoiser import choose_trained
from kubetuner.training.memory.prediction import Predictor, Shapes
from kubetuner.training.optimizers import clip_gradients, make_optimizer
from kubetuner.training.recompute import recompute_activations

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore"),  # Of the quantisation libraries.
]
PATHS = {
    "pixart_sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sana": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
}
LORA = {"model_type": "lora", "lora": LoraSettings()}
KINDS: dict[str, dict[str, object]] = {
    "full": {"model_type": "full"},
    "full-accumulated": {"model_type": "full", "gradient_accumulation_steps": 2},
    "lora": LORA,
    "lora-kept": {**LORA, "gradient_checkpointing": False},
    "lora-interval": {**LORA, "gradient_checkpointing_interval": 2},
    "lora-int8-torchao": {**LORA, "base_model_precision": "int8-torchao"},
    "lora-int8-quanto": {**LORA, "base_model_precision": "int8-quanto"},
    "lora-nf4": {**LORA, "base_model_precision": "nf4-bnb", "gradient_checkpointing": False},
}


@pytest.fixture(autouse=True)
def _empty_gpu() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PATHS)
def test_the_peak_is_predicted_within_15_percent(
    family: str, kind: str, record_property: Callable[[str, object], None]
) -> None:
    section = TrainSection.model_validate(
        {
            "model": {"family": family, "path": PATHS[family]},
            "datasets": (DatasetSampling(id="a"),),
            "max_train_steps": 1,
            "train_batch_size": 2,
            **KINDS[kind],
        }
    )
    if missing := missing_library(section.base_model_precision):
        pytest.skip(f"needs {missing}")
    outline = OUTLINES[section.model.family]
    edge = 1024 // outline.vae_factor
    shapes = Shapes((outline.latent_channels, edge, edge), outline.text_floats // outline.text_width)
    predicted = Predictor(shapes).predict(section).peak
    if predicted > 0.9 * torch.cuda.get_device_properties(0).total_memory:
        pytest.skip(f"needs {predicted / 2**30:.0f} GiB")
    measured = _measure(section, shapes)
    record_property("GiB predicted, measured", (predicted / 2**30, measured / 2**30))
    assert predicted == pytest.approx(measured, rel=0.15)


def _measure(section: TrainSection, shapes: Shapes) -> int:
    """Three steps with random weights, as the loop takes them."""
    device = torch.device("cuda")
    family = load_family(section.model.family)
    denoiser = quantise(_random(section.model, section.frozen_in_bf16, device), section.base_model_precision)
    use_attention(denoiser, section.attention_mechanism, device)
    if section.gradient_checkpointing:
        recompute_activations(denoiser, section.gradient_checkpointing_interval)
    denoiser = choose_trained(denoiser, section, family).train()
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(section, parameters)
    batch = section.train_batch_size
    for _ in range(3):
        for _ in range(section.gradient_accumulation_steps):
            noisy, target = torch.randn(2, batch, *shapes.latents, device=device)
            named = family.conditioning_shapes(denoiser, shapes.tokens)
            text = {name: torch.ones(batch, *shape, device=device) for name, shape in named.items()}
            with torch.autocast("cuda", torch.bfloat16):
                prediction = family.predict(denoiser, noisy, torch.full((batch,), 500.0, device=device), text)
            (prediction.float() - target).square().mean().backward()
        clip_gradients(section, parameters)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


def _random(ref: ModelRef, narrow: bool, device: torch.device) -> nn.Module:
    """The published network with small random weights."""
    denoiser = outline_denoiser(ref)
    if narrow:
        for parameter in denoiser.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    denoiser.to_empty(device=device)
    with torch.no_grad():
        for tensor in [*denoiser.parameters(), *denoiser.buffers()]:
            tensor.normal_(std=0.02)
    return denoiser
