"""What a run will take, in bytes; estimates that need no model to be loaded."""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kubetuner.config.models import OUTLINES, vae_place
from kubetuner.config.optimizers import OPTIMIZERS
from kubetuner.config.precision import BYTES
from kubetuner.config.sections.captions import DatasetCaptions
from kubetuner.config.sections.steps import ModelRef, Sections
from kubetuner.steps.planning.datasets import Measured

# float32 weights and gradients.
_FULL_BYTES = 8
_BYTES = {"bf16": 2, "fp32": 4, "no": 4}


@dataclass(frozen=True)
class Costs:
    """Sizes in bytes.

    Attributes:
        latents_bytes: Latents of all datasets that keep theirs.
        text_embeds_bytes: At most, with one caption per picture; captions that agree are stored once and padding is
            trimmed.
        parameters: Of the denoiser.
        training_memory_bytes: Weights, gradients, optimizer state, and averages on the accelerator; activations come
            on top. Of one GPU's share, where FSDP2 shares them out.
    """

    latents_bytes: int
    text_embeds_bytes: int
    parameters: int
    training_memory_bytes: int


def estimate(sections: Sections, measured: Sequence[Measured]) -> Costs:
    """The costs of a run over the measured datasets."""
    model = sections.train.model
    factor, channels = vae_shape(model)
    floats = sum(
        count * channels * (width // factor) * (height // factor)
        for one in measured
        if one.entry.geometry.vae_cache != "disabled"
        for sizes in one.buckets.values()
        for (width, height), count in sizes.items()
    )
    texts = sum(one.samples * _variants(one.entry.captions) for one in measured) + 1
    parameters = _parameters(model)
    if sections.train.layer_freeze_strategy == "bitfit":
        memory = parameters * _BYTES["fp32"]
    elif sections.train.model_type == "full":
        averages = 4 if sections.train.ema is not None and sections.train.ema.device == "accelerator" else 0
        state = OPTIMIZERS[sections.train.optimizer].state_bytes
        memory = int(parameters * (_FULL_BYTES + state + averages))
    else:
        whole = _BYTES["bf16" if sections.train.frozen_in_bf16 else "fp32"]
        memory = int(parameters * BYTES.get(sections.train.base_model_precision, whole))
    if sections.train.fsdp is not None:
        memory //= sections.train.planned_processes
    return Costs(
        latents_bytes=floats * _BYTES[sections.cache_vae.dtype] * (2 if sections.cache_vae.vae_cache_moments else 1),
        text_embeds_bytes=texts * _text_floats(model) * _BYTES[sections.cache_text_embeds.dtype],
        parameters=parameters,
        training_memory_bytes=memory,
    )


def _variants(captions: DatasetCaptions) -> int:
    """Texts that one caption becomes, at most."""
    return captions.shuffle.count + captions.shuffle.include_original if captions.shuffle else 1


def vae_shape(model: ModelRef) -> tuple[int, int]:
    """Pixels per latent along an edge, and channels: from the folder's VAE, or else the family's."""
    outline = OUTLINES[model.family]
    place, subfolder = vae_place(model)
    config = _json(Path(place.path) / subfolder / "config.json")
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    channels = config.get("latent_channels")
    if isinstance(levels, list) and levels and isinstance(channels, int):
        return int(2 ** (len(levels) - 1)), channels
    return outline.vae_factor, outline.latent_channels


def _text_floats(model: ModelRef) -> int:
    outline = OUTLINES[model.family]
    config = _json(Path(model.path) / outline.denoiser / "config.json")
    width = config.get("caption_channels") or config.get("cross_attention_dim")
    return outline.text_floats * width // outline.text_width if isinstance(width, int) else outline.text_floats


def _parameters(model: ModelRef) -> int:
    outline = OUTLINES[model.family]
    files = sorted((Path(model.path) / outline.denoiser).glob("*.safetensors"))
    chosen = [path for path in files if f".{model.variant}." in path.name] if model.variant else files
    if chosen:
        return sum(_count(path) for path in chosen)
    name = model.path.lower()
    return int(next(billions for part, billions in outline.parameters.items() if part in name) * 1e9)


def _count(path: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
