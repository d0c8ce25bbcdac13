"""Flow matching (Sana): continuous sigmas, velocity prediction."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from kubetuner.diffusion.process import NoisySample, broadcast, squared_error


@dataclass(frozen=True)
class FlowProcess:
    """Noises with ``(1 - sigma) * x + sigma * noise``; the target is ``noise - x``.

    Attributes:
        density: ``logit_normal`` draws sigma = sigmoid(sigmoid_scale * normal), ``uniform`` draws it evenly in 0..1.
        sigmoid_scale: See ``density``.
        shift: sigma' = shift * sigma / (1 + (shift - 1) * sigma) after the draw; 1, or 0 and below, change nothing.
    """

    density: Literal["logit_normal", "uniform"] = "logit_normal"
    sigmoid_scale: float = 1.0
    shift: float = 3.0

    def draw_levels(self, batch_size: int, generator: Generator) -> Tensor:
        """Sigmas float32 ``[B]``."""
        if self.density == "uniform":
            return self._shifted(torch.rand(batch_size, generator=generator))
        return self._shifted(torch.sigmoid(self.sigmoid_scale * torch.randn(batch_size, generator=generator)))

    def eval_levels(self, count: int) -> Tensor:
        """Sigmas float32 ``[count]`` at the middles of ``count`` equal bins, ascending; not shifted."""
        return (torch.arange(count, dtype=torch.float32) + 0.5) / count

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> NoisySample:
        """Noise ``latents`` at sigmas ``levels``."""
        levels = levels.to(latents.device, torch.float32)
        sigma = broadcast(levels, latents)
        return NoisySample((1 - sigma) * latents + sigma * noise, levels * 1000, noise - latents)

    def loss(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """Mean squared error per sample."""
        return squared_error(prediction, sample.target)

    def _shifted(self, sigmas: Tensor) -> Tensor:
        if self.shift <= 0:
            return sigmas
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
