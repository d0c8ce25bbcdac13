"""The KL autoencoder that PixArt Sigma and SDXL share, and how pixels come to any autoencoder."""

from typing import Any

import torch
from torch import Tensor, nn

from kubetuner.config.sections.steps import ModelRef
from kubetuner.families import loading


class KlLatents:
    """The verbs of :class:`~kubetuner.families.base.Family` of latents, for families with a KL autoencoder."""

    def load_vae(self, ref: ModelRef, device: torch.device) -> nn.Module:
        """See :class:`~kubetuner.families.base.Family`."""
        from diffusers import AutoencoderKL

        return loading.load_autoencoder(AutoencoderKL, ref, device)

    @torch.no_grad()
    def encode_pixels(self, vae: Any, pixels: Tensor, noise: Tensor | None) -> Tensor:
        """Scaled latents float32 of ``pixels``: the posterior's sample for ``noise``, or its mode."""
        posterior = vae.encode(as_wanted(vae, pixels)).latent_dist
        latents = posterior.mode() if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        scaled: Tensor = ((latents - _shift(vae)) * vae.config.scaling_factor).float()
        return scaled

    @torch.no_grad()
    def encode_moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents of ``pixels``, float32."""
        posterior = vae.encode(as_wanted(vae, pixels)).latent_dist
        scale = vae.config.scaling_factor
        return ((posterior.mean - _shift(vae)) * scale).float(), (posterior.std * scale).float()

    def latent_shape(self, vae: Any, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of that many pixels."""
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        return vae.config.latent_channels, height // factor, width // factor


def as_wanted(vae: Any, pixels: Tensor) -> Tensor:
    """``pixels`` on the autoencoder's device, in its dtype and channels last, as its weights are loaded."""
    weights = next(vae.parameters())  # Not vae.device and vae.dtype: diffusers finds these by a walk over all modules.
    return pixels.to(weights.device, weights.dtype, memory_format=torch.channels_last)


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0
