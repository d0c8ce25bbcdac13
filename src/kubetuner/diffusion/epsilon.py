"""Variance-preserving diffusion (PixArt Sigma, SDXL): discrete timesteps, epsilon or v prediction."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from kubetuner.diffusion.process import NoisySample, broadcast, squared_error


@dataclass(frozen=True)
class EpsilonProcess:
    """Noises with ``sqrt(abar) * x + sqrt(1 - abar) * noise``.

    Attributes:
        alphas_cumprod: abar of every timestep, float32 ``[T]`` on CPU, from the base's scheduler.
        segmented: Spread the timesteps of a batch over equal segments of the range instead of drawing independently.
            SimpleTuner's segments overlap by one timestep; ours do not.
        prediction: What the model says: the noise, or v = sqrt(abar) * noise - sqrt(1 - abar) * x.
    """

    alphas_cumprod: Tensor
    segmented: bool = True
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"

    def draw_levels(self, batch_size: int, generator: Generator) -> Tensor:
        """Timesteps int64 ``[B]``; segmented ones walk from the noisiest segment down."""
        steps = len(self.alphas_cumprod)
        uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        if self.segmented:
            uniform = (torch.arange(batch_size - 1, -1, -1, dtype=torch.float64) + uniform) / batch_size
        return (uniform * steps).long().clamp(max=steps - 1)

    def eval_levels(self, count: int) -> Tensor:
        """Timesteps int64 ``[count]`` at the middles of ``count`` equal bins, ascending."""
        return ((torch.arange(count, dtype=torch.float64) + 0.5) / count * len(self.alphas_cumprod)).long()

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> NoisySample:
        """Noise ``latents`` at timesteps ``levels``."""
        abar = self.alphas_cumprod[levels.cpu()]
        signal = broadcast(abar.sqrt(), latents)
        spread = broadcast((1 - abar).sqrt(), latents)
        noisy = signal * latents + spread * noise
        target = noise if self.prediction == "epsilon" else signal * noise - spread * latents
        return NoisySample(noisy, levels.to(latents.device), target)

    def loss(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """Mean squared error per sample."""
        return squared_error(prediction, sample.target)
