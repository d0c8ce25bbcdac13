"""Denoisers of published size with random weights, and the floating-point operations that training them takes.

The configurations are those of the published checkpoints' ``config.json``; nothing is downloaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from bench.fixed_batch import FixedBatch
from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.steps import DatasetSampling, FamilyName, ModelRef, TrainSection
from kubetuner.families import load_family
from kubetuner.families.architectures import PUBLISHED
from kubetuner.training.denoiser import make_trainable
from kubetuner.training.objective import Objective
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

CHECKPOINTS: dict[FamilyName, str] = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "pixart_sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "sana": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
}
_PIXELS_PER_LATENT: dict[FamilyName, int] = {"sdxl": 8, "pixart_sigma": 8, "sana": 32}
_TOKENS: dict[FamilyName, int] = {"sdxl": 77, "pixart_sigma": 300, "sana": 300}


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        edge: Of square pictures, in pixels.
        tiny: The demo's unit model instead of the published one, for a CPU.
    """

    family: FamilyName
    model_type: str
    edge: int
    tiny: bool = False

    def __str__(self) -> str:
        return f"{self.family} {self.model_type} {self.edge} px{' (tiny)' if self.tiny else ''}"

    def section(self, base: Path, **settings: object) -> TrainSection:
        """Settings of ``train``: rank 16 for a LoRA, nothing recomputed, no checkpoints."""
        values: dict[str, object] = {
            "model": ModelRef(family=self.family, path=str(base)), "model_type": self.model_type,
            "lora": LoraSettings(rank=16, alpha=16.0, dropout=0.0) if self.model_type == "lora" else None,
            "datasets": (DatasetSampling(id="a"),), "max_train_steps": 1, "gradient_checkpointing": False,
            "resume_from_checkpoint": "", "checkpoint_step_interval": 0,
        }  # fmt: skip
        return TrainSection.model_validate(values | settings)

    def denoiser(self, section: TrainSection, device: torch.device) -> nn.Module:
        """The network on ``device`` as :mod:`kubetuner.training.denoiser` prepares it."""
        family = load_family(self.family)
        if self.tiny:
            model = getattr(build_pipeline(self.family, "unit"), family.facts.denoiser).to(device)
        else:
            with torch.device(device):
                model = _published(self.family)
        if section.frozen_in_bf16:
            model = model.to(torch.bfloat16)
        with torch.device(device):
            return make_trainable(model, section, family, device)

    def batch(self, denoiser: nn.Module, size: int) -> FixedBatch:
        """Random latents, and texts of full length."""
        config: Any = denoiser.config
        edge, tokens = self.edge // (8 if self.tiny else _PIXELS_PER_LATENT[self.family]), _TOKENS[self.family]
        latents = torch.randn(size, config.in_channels, edge, edge)
        if self.family == "sdxl":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            text = {"embeds": torch.randn(tokens, config.cross_attention_dim), "pooled": torch.randn(pooled)}
        else:
            text = {"embeds": torch.randn(tokens, config.caption_channels)}
        row = LatentRow(
            sample="a/b", dataset="a", key="k", shard="s", intermediary_size=(self.edge, self.edge), crop=(0, 0),
            target_size=(self.edge, self.edge), bucket="1.0",
        )  # fmt: skip
        return FixedBatch([row] * size, latents, [text] * size)

    def objective(self, section: TrainSection, batch: FixedBatch) -> Objective:
        """The family's own, in bfloat16 autocast."""
        family = load_family(self.family)
        return Objective(family, family.noise_process(section.model, section.process()), batch.texts[0], 0, True)


def write_schedulers(folder: Path) -> None:
    """A small pipeline of each family in ``folder``: what an objective reads of its base is the scheduler alone."""
    for family in CHECKPOINTS:
        write_pipeline(build_pipeline(family, "unit"), folder / family)


@dataclass(frozen=True)
class Counted:
    """Of one picture: floating-point operations, 2 per multiplication and addition; and weights of the network."""

    forward: int
    whole: int
    parameters: int


def count(case: Case, base: Path) -> Counted:
    """Count a training step of one picture on the meta device, where nothing is computed. Nothing is recomputed."""
    meta = torch.device("meta")
    section = case.section(base, mixed_precision="no")  # There is no autocast on the meta device.
    denoiser = case.denoiser(section, meta)
    question = case.objective(section, batch := case.batch(denoiser, 1)).question(batch, 0, 0).on(meta)
    family = load_family(case.family)
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward}
    ) as counter:
        noisy = question.noisy
        prediction = family.predict(denoiser, noisy.noisy_latents, noisy.timesteps, question.conditioning)
        forward = counter.get_total_flops()
        prediction.sum().backward()  # type: ignore[no-untyped-call]
    frozen = sum(value.numel() for name, value in denoiser.named_parameters() if "lora_" not in name)
    return Counted(forward, counter.get_total_flops(), frozen)


def _conv_backward(
    grad_shape: Sequence[int], x_shape: Sequence[int], w_shape: Sequence[int], *rest: Any, **_: object
) -> int:
    """Of the gradients of input and weights, each as much as the convolution itself.

    torch's own formula leaves the groups out of the weights' gradient, and a depthwise convolution has one per channel.
    """
    transposed, wanted = rest[4], rest[7]
    once: int = conv_flop_count(list(x_shape), list(w_shape), list(grad_shape), transposed=transposed)
    return once * (int(wanted[0]) + int(wanted[1]))


def _published(family: FamilyName) -> nn.Module:
    import diffusers

    config = PUBLISHED[CHECKPOINTS[family]]
    kind: Any = getattr(diffusers, str(config["_class_name"]))
    made: nn.Module = kind.from_config(dict(config))
    return made
