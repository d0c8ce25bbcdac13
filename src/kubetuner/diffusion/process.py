"""What every noise process offers the training loop and the evaluation."""

from dataclasses import dataclass
from typing import Protocol

from torch import Generator, Tensor


@dataclass(frozen=True)
class NoisySample:
    """A noised batch and what the model should say about it.

    Attributes:
        noisy_latents: Model input, float32 ``[B, C, h, w]``.
        timesteps: What the model is told: int64 0..999 (epsilon) or float32 ``1000 * sigma`` (flow), ``[B]``.
        target: What the prediction is compared with, float32 ``[B, C, h, w]``.
    """

    noisy_latents: Tensor
    timesteps: Tensor
    target: Tensor


class NoiseProcess(Protocol):
    """How latents are noised, what is predicted, and how predictions are scored."""

    def draw_levels(self, batch_size: int, generator: Generator) -> Tensor:
        """Draw one noise level per sample, ``[B]``: timesteps (epsilon) or sigmas in 0..1 (flow), on CPU."""
        ...

    def eval_levels(self, count: int) -> Tensor:
        """``count`` evenly spread noise levels (bin mid-points), ``[count]``, for the fixed-noise evaluation loss."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> NoisySample:
        """Noise ``latents`` float32 ``[B, C, h, w]`` at ``levels`` ``[B]``."""
        ...

    def loss(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """Loss per sample, float32 ``[B]``; its mean is the training loss."""
        ...


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1, 1, 1]`` on the device of ``like``."""
    return values.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample, float32 ``[B]``."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
