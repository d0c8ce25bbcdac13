"""The published checkpoints' networks: what their ``config.json`` says, so that sizes are known before a download.

A network is made of such a configuration on PyTorch's ``meta`` device: every shape, and no numbers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from kubetuner.config.models import OUTLINES, vae_place
from kubetuner.config.sections.steps import ModelRef
from kubetuner.errors import InputError

_CLASS = "_class_name"


def _pixart(layers: int, sample_size: int, interpolation_scale: int) -> dict[str, object]:
    return {
        _CLASS: "PixArtTransformer2DModel",
        "num_layers": layers,
        "sample_size": sample_size,
        "interpolation_scale": interpolation_scale,
        "caption_channels": 4096,
        "use_additional_conditions": False,
    }


def _sana(layers: int, sample_size: int, *, wide: bool = True, qk_norm: str | None = None) -> dict[str, object]:
    width = 2240 if wide else 1152
    return {
        _CLASS: "SanaTransformer2DModel",
        "num_attention_heads": width // 32,
        "num_cross_attention_heads": 20 if wide else 16,
        "cross_attention_head_dim": 112 if wide else 72,
        "cross_attention_dim": width,
        "num_layers": layers,
        "caption_channels": 2304,
        "sample_size": sample_size,
        "qk_norm": qk_norm,
    }


_SDXL: dict[str, object] = {
    _CLASS: "UNet2DConditionModel",
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
_NORMED = "rms_norm_across_heads"

PUBLISHED: Mapping[str, Mapping[str, object]] = {
    "terminusresearch/pixart-900m-1024-ft-v0.6": _pixart(42, 128, 2),
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": _pixart(28, 64, 1),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": _pixart(28, 128, 2),
    "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS": _pixart(28, 256, 4),
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
    "stabilityai/stable-diffusion-xl-base-0.9": _SDXL,
    "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers": _sana(60, 32, qk_norm=_NORMED),
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": _sana(20, 32, qk_norm=_NORMED),
    "Efficient-Large-Model/Sana_1600M_2Kpx_BF16_diffusers": _sana(20, 64),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": _sana(20, 32),
    "terminusresearch/sana-1.6b-1024px": _sana(20, 32),
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": _sana(28, 32, wide=False),
    "Efficient-Large-Model/Sana_600M_512px_diffusers": _sana(28, 16, wide=False),
}
"""By hub id; values that the classes of diffusers have as defaults are left out."""


_LEVELS, _DC_BLOCKS = 4, ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
PUBLISHED_KL: dict[str, object] = {
    _CLASS: "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * _LEVELS,
    "up_block_types": ("UpDecoderBlock2D",) * _LEVELS,
    "layers_per_block": 2,
}
PUBLISHED_DC: dict[str, object] = {
    _CLASS: "AutoencoderDC",
    "encoder_block_types": _DC_BLOCKS,
    "decoder_block_types": _DC_BLOCKS,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
}
_AUTOENCODERS = {
    "PixArtTransformer2DModel": PUBLISHED_KL,
    "UNet2DConditionModel": PUBLISHED_KL,
    "SanaTransformer2DModel": PUBLISHED_DC,
}
"""Of the published checkpoints, by their denoiser's class."""


def outline_denoiser(ref: ModelRef) -> nn.Module:
    """The denoiser of ``ref`` on the ``meta`` device, float32, in training mode.

    Raises:
        InputError: Its configuration is not to be had, or is of no network that diffusers has.
    """
    file = f"{OUTLINES[ref.family].denoiser}/config.json"
    return _outline(ref.path, _known(ref.path) or _config(ref.path, file, ref.revision)).train()


def outline_autoencoder(ref: ModelRef) -> nn.Module:
    """The VAE of ``ref`` on the ``meta`` device, float32, in eval mode and without gradients.

    Raises:
        InputError: As :func:`outline_denoiser`.
    """
    place, subfolder = vae_place(ref)
    known = _known(place.path) if subfolder else None
    published = _AUTOENCODERS.get(str(known[_CLASS])) if known is not None else None
    config = published or _config(place.path, f"{subfolder}/config.json".lstrip("/"), place.revision)
    return _outline(place.path, config).eval().requires_grad_(False)


def _outline(path: str, config: Mapping[str, object]) -> nn.Module:
    """The network that ``config``, which is of ``path``, is of."""
    import diffusers

    kind: Any = getattr(diffusers, str(config.get(_CLASS)), None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin):
        raise InputError(f"{path}: {_CLASS} is {config.get(_CLASS)!r}; expected a network of diffusers.")
    try:
        with torch.device("meta"):
            made: nn.Module = cast(Any, kind).from_config(dict(config))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: its configuration makes no {config[_CLASS]}: {error}.") from error
    return made


def _known(path: str) -> Mapping[str, object] | None:
    """The denoiser's configuration of a published checkpoint, unless ``path`` is a folder."""
    if Path(path).is_dir():
        return None
    return {name.lower(): config for name, config in PUBLISHED.items()}.get(path.lower())


def _config(path: str, file: str, revision: str) -> Mapping[str, object]:
    """What ``file`` of a folder or a hub repository says."""
    try:
        config = json.loads(_path(path, file, revision).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} of {path} cannot be read: {str(error).rstrip('.')}.") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} of {path} holds a {type(config).__name__}; expected an object.")
    return config


def _path(path: str, file: str, revision: str) -> Path:
    """The file in the folder, or downloaded (a few kB)."""
    if Path(path).is_dir():
        return Path(path) / file
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(path, file, revision=revision or None))
