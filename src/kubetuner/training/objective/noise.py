"""The noise of a micro-batch, with the changes that were asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kubetuner.config.sections.objective import NoiseSettings
from kubetuner.training.randomness import generator


@dataclass(frozen=True)
class Noise:
    """Standard normal but for the changes, float32 ``[B, C, h, w]``.

    Attributes:
        target: What the model should say; also the input's unless that is perturbed.
        input: What the latents are noised with.
    """

    target: Tensor
    input: Tensor


def draw_noise(settings: NoiseSettings, shape: Sequence[int], seed: int, step: int, micro: int) -> Noise:
    """Noise that depends on the settings and the position alone.

    Offset noise shifts whole channels of a batch that chance has chosen. A perturbation goes to the input only, and
    falls linearly to nothing at ``perturbation_steps``.
    """
    noise = torch.randn(shape, generator=generator(seed, "noise", step, micro))
    if settings.offset > 0:
        chance = generator(seed, "offset", step, micro)
        if torch.rand((), generator=chance) < settings.offset_probability:
            noise = noise + settings.offset * torch.randn(shape[0], shape[1], 1, 1, generator=chance)
    strength = _strength(settings, step)
    if strength == 0:
        return Noise(noise, noise)
    further = torch.randn(shape, generator=generator(seed, "perturbation", step, micro))
    return Noise(noise, noise + strength * further)


def _strength(settings: NoiseSettings, step: int) -> float:
    if settings.perturbation_steps == 0:
        return settings.perturbation
    return settings.perturbation * max(0.0, 1 - step / settings.perturbation_steps)
