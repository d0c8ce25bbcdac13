"""KL autoencoder arithmetic that PixArt Sigma and SDXL share."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode_kl(vae: Any, pixels: Tensor, noise: Tensor | None) -> Tensor:
    """Scaled latents float32 of ``pixels``: the posterior's sample for ``noise``, or its mode."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    latents = posterior.mode() if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scaled: Tensor = ((latents - shift) * vae.config.scaling_factor).float()
    return scaled


@torch.no_grad()
def kl_moments(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents of ``pixels``, float32."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = vae.config.scaling_factor
    return ((posterior.mean - shift) * scale).float(), (posterior.std * scale).float()


def kl_latent_shape(vae: Any, height: int, width: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a picture of that many pixels."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, height // factor, width // factor
