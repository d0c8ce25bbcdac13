"""Trains a demo autoencoder on random shapes, rings included: it must be able to draw them."""

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from pipelines.recipes.demo.shapes import Picture, old_pictures, random_pictures, ring_pictures

logger = logging.getLogger(__name__)

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderDC


@dataclass(frozen=True)
class AutoencoderRun:
    """How an autoencoder is trained."""

    steps: int
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 30
    latent_noise: float = 0.05
    pictures: int = 2048
    seed: int = 0


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as one batch in -1 .. 1."""
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1


def encode(vae: Autoencoder, images: Tensor) -> Tensor:
    """Unscaled latents, without sampling noise."""
    encoded = vae.encode(images)
    latents: Tensor = encoded.latent if isinstance(vae, AutoencoderDC) else encoded.latent_dist.mean
    return latents


def train_autoencoder(vae: Autoencoder, run: AutoencoderRun) -> float:
    """Train in place, set the scaling factor from the latents, return the PSNR."""
    torch.manual_seed(run.seed)
    rng = random.Random(run.seed)
    images = pixels([picture.draw() for picture in random_pictures(run.pictures, rng)])
    images = images.contiguous(memory_format=torch.channels_last)
    vae.to(memory_format=torch.channels_last)
    vae.train()
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=run.learning_rate, weight_decay=1e-4, betas=(0.9, 0.99), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, run))
    for step in range(run.steps):
        batch = images[torch.randint(len(images), (run.batch_size,))]
        loss = _reconstruction_loss(vae, batch, run.latent_noise)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            quality = peak_signal_to_noise(vae, old_pictures())
            logger.info("autoencoder step %d loss %.4f psnr %.1f dB", step + 1, loss.item(), quality)
    vae.eval()
    vae.to(memory_format=torch.contiguous_format)
    set_scaling_factor(vae)
    return peak_signal_to_noise(vae, [*old_pictures(), *ring_pictures()])


@torch.no_grad()
def set_scaling_factor(vae: Autoencoder) -> None:
    """Choose the factor that gives the latents a standard deviation of one."""
    known = [*old_pictures(), *ring_pictures()]
    latents = encode(vae, pixels([picture.draw() for picture in known]))
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


@torch.no_grad()
def peak_signal_to_noise(vae: Autoencoder, pictures: Sequence[Picture]) -> float:
    """PSNR in dB over pictures that are encoded and decoded."""
    images = pixels([picture.draw() for picture in pictures])
    decoded = vae.decode(encode(vae, images)).sample
    return -10 * math.log10(((decoded - images) / 2).square().mean().item())


def _reconstruction_loss(vae: Autoencoder, images: Tensor, latent_noise: float) -> Tensor:
    """Absolute plus squared error of slightly disturbed latents, which are kept small."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = encode(vae, images)
    latents = latents.float()
    disturbed = latents + latent_noise * latents.detach().std() * torch.randn_like(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = vae.decode(disturbed).sample
    error: Tensor = decoded.float() - images
    return error.abs().mean() + 2 * error.square().mean() + 1e-4 * latents.square().mean()


def _learning_rate(step: int, run: AutoencoderRun) -> float:
    """Linear warm-up, then a cosine down to three percent."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / run.steps)
    return min(1.0, (step + 1) / run.warmup_steps) * (0.03 + 0.97 * cosine)
