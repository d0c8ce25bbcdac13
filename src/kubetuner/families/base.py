"""The protocol of a model family: the verbs that caching, training and evaluation need.

Tensors travel by name in plain dictionaries; the family alone knows the names. ``[B, C, h, w]`` are latents,
``[B, 3, H, W]`` pixels in -1..1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.objective import ProcessSettings
from kubetuner.config.sections.steps import CacheTextSection, EvaluateSection, ModelRef
from kubetuner.config.text_rounding import WHOLE_TEXT, TextRounding
from kubetuner.diffusion.process import NoiseProcess
from kubetuner.families.text import PAD_TO, Tokens

Named = dict[str, Tensor]


@dataclass(frozen=True)
class FamilyFacts:
    """What is constant about a family.

    Attributes:
        name: ``model_family``.
        denoiser: Subfolder and pipeline attribute of the trained model: ``transformer`` or ``unet``.
        lora_targets: Default ``target_modules``.
        pipeline_loads_lora: Whether the diffusers pipeline has ``load_lora_weights``.
        text_tensors: Names of the cached text tensors of one caption.
        trims_text: Whether cached sequences are trimmed to their mask (not for CLIP).
        license: Hub licence id for the model card.
        pipeline: diffusers class name of the pipeline, for cards and messages.
        repeated_blocks: Class names of the blocks that the denoiser consists of for the most part: what is compiled.
        channels_last: Whether the denoiser's convolutions want channels last on a GPU; see docs/performance.md.
    """

    name: str
    denoiser: str
    lora_targets: tuple[str, ...]
    pipeline_loads_lora: bool
    text_tensors: tuple[str, ...]
    trims_text: bool
    license: str
    pipeline: str
    repeated_blocks: tuple[str, ...]
    channels_last: bool


class Family(Protocol):
    """One model family; stateless."""

    facts: FamilyFacts

    def load_vae(self, ref: ModelRef, device: torch.device) -> nn.Module:
        """The frozen autoencoder in eval mode, float32."""
        ...

    def encode_pixels(self, vae: nn.Module, pixels: Tensor, noise: Tensor | None) -> Tensor:
        """Scaled latents float32 ``[B, C, h, w]`` of ``pixels``; ``noise`` of that shape samples the posterior (KL)."""
        ...

    def encode_moments(self, vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, each float32 ``[B, C, h, w]``; zeros without a posterior.

        ``mean + std * noise`` is what :meth:`encode_pixels` gives for that noise.
        """
        ...

    def latent_shape(self, vae: nn.Module, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of that many pixels."""
        ...

    def load_text_encoders(self, ref: ModelRef, device: torch.device, rounding: TextRounding = WHOLE_TEXT) -> Any:
        """Tokenizers and frozen text encoders, stored as ``rounding`` says; opaque to callers.

        Raises:
            InputError: The library for a precision is missing.
        """
        ...

    def tokenize(self, encoders: Any, texts: Sequence[str], section: CacheTextSection) -> list[Tokens]:
        """Per text what :meth:`encode_tokens` takes; ``facts.trims_text`` says whether lengths differ."""
        ...

    def encode_tokens(self, encoders: Any, tokens: Sequence[Tokens]) -> Named:
        """The tensors ``[B, …]`` of texts of one padded length, on the encoders' device, before anything is cut off."""
        ...

    def load_denoiser(self, ref: ModelRef, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The denoiser alone."""
        ...

    def noise_process(self, ref: ModelRef, settings: ProcessSettings) -> NoiseProcess:
        """The training noise process, from the base's scheduler config as ``ref.scheduler`` changes it."""
        ...

    def collate(
        self, texts: Sequence[Named | None], null: Named, rows: Sequence[LatentRow], pad_to: int = PAD_TO
    ) -> Named:
        """Batched conditioning, float32 on CPU.

        ``None`` marks a dropped caption; ``null`` is what caches keep of the empty text. Texts of
        different lengths are padded to a multiple of ``pad_to`` tokens.
        """
        ...

    def conditioning_shapes(self, denoiser: nn.Module, tokens: int) -> dict[str, tuple[int, ...]]:
        """Per tensor of :meth:`collate` its shape without the batch, for captions of up to so many tokens."""
        ...

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """The prediction in the space of the process's target, ``[B, C, h, w]``."""
        ...

    def load_pipeline(self, ref: ModelRef, denoiser: nn.Module | None, device: torch.device) -> Any:
        """The stock diffusers pipeline with ``denoiser`` (``None``: the base's) for pictures and for saving."""
        ...

    def draw(self, pipeline: Any, prompt: str, size: tuple[int, int], seed: int, section: EvaluateSection) -> Any:
        """One PIL picture of ``size`` (width, height)."""
        ...

    def add_adapter(self, denoiser: nn.Module, settings: LoraSettings) -> nn.Module:
        """The denoiser, in place, with an adapter that alone is trainable; float32 whatever the base's dtype.

        Raises:
            InputError: A target names no layer, a layer cannot have this adapter, or ``init_lora`` does not fit.
        """
        ...

    def save_adapter(self, folder: Path, denoiser: nn.Module) -> None:
        """Write the adapter with its rank and alpha: a LoRA file where stock diffusers loads it, or a PEFT folder."""
        ...

    def load_adapter(self, denoiser: nn.Module, folder: Path) -> nn.Module:
        """The denoiser with the saved adapter applied."""
        ...
