"""Scheduled sampling: the model draws its own noisy input from more noise, as it does when it draws a picture.

A model that only ever saw latents with exact noise never learns what to do with its own small errors (Bengio et al.
2015, https://arxiv.org/abs/1506.03099). So some samples are noised further, and brought back to their level by the
model itself; what is asked of it there stays what it was.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kubetuner.config.sections.objective import RolloutSettings
from kubetuner.diffusion.process import NoiseProcess
from kubetuner.diffusion.solvers import Path, step_from

Ask = Callable[[Tensor, Tensor, list[int]], Tensor]
"""The prediction for noisy latents ``[b, C, h, w]`` at timesteps ``[b]`` of those rows of the batch; no gradients."""


@dataclass(frozen=True)
class Departure:
    """Where the samples of a batch start from.

    Attributes:
        start: Noised at the first of ``levels``, float32 ``[B, C, h, w]``.
        levels: ``[most steps + 1, B]`` on CPU, from the noisiest down by a timestep each; a sample that has arrived
            stays at its last one.
        steps: Timesteps that each sample goes; 0 for those that stay as they were noised.
    """

    start: Tensor
    levels: Tensor
    steps: tuple[int, ...]

    def moving(self, taken: int) -> list[int]:
        """Rows of the samples that have not arrived after so many steps."""
        return [row for row, steps in enumerate(self.steps) if steps > taken]


def probability(settings: RolloutSettings, step: int) -> float:
    """The share of samples rolled out at an optimizer step; 0 is the first step."""
    if settings.ramp_steps == 0:
        return settings.probability
    progress = min(max((step - settings.ramp_start) / settings.ramp_steps, 0.0), 1.0)
    if settings.ramp_shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return settings.probability + (settings.final_probability - settings.probability) * progress


def offsets(settings: RolloutSettings, uniform: Tensor) -> Tensor:
    """Lengths 0..max_offset, int64, of numbers in 0..1 (1 excluded)."""
    match settings.strategy:
        case "uniform":
            return (uniform * (settings.max_offset + 1)).long()
        case "biased_early":
            return (uniform.square() * settings.max_offset).round().long()
        case "biased_late":
            return ((1 - uniform.square()) * settings.max_offset).round().long()


def depart(
    process: NoiseProcess, latents: Tensor, noise: Tensor, levels: Tensor, steps: Sequence[int]
) -> Departure | None:
    """Noise ``latents`` at as many timesteps above ``levels`` ``[B]`` as ``steps`` says; ``None`` where none moves.

    There must be room for them (:meth:`~kubetuner.diffusion.process.NoiseProcess.room`).
    """
    if not any(steps):
        return None
    lengths = torch.tensor(steps)
    left = (lengths - torch.arange(max(steps) + 1)[:, None]).clamp(min=0)
    path = process.noisier(levels.expand(len(left), -1), left)
    return Departure(process.add_noise(latents, noise, path[0]).noisy_latents, path, tuple(steps))


def roll_out(settings: RolloutSettings, process: NoiseProcess, departure: Departure, ask: Ask) -> Tensor:
    """The latents at the samples' own levels, ``[B, C, h, w]``, as the model makes them out of ``departure.start``.

    Each step asks for the samples that still move, so that a batch costs as many predictions as its samples have steps.
    """
    path = Path(*process.rates(departure.levels))
    corrects = settings.sampler == "unipc"
    latents, settled = departure.start.clone(), departure.start.clone()
    cleans: dict[int, Tensor] = {}
    for place in range(max(departure.steps)):
        rows = departure.moving(place)
        levels, noisy = departure.levels[place, rows], latents[rows]
        prediction = ask(noisy, process.timesteps(levels).to(noisy.device), rows)
        cleans[place] = torch.zeros_like(latents)
        cleans[place][rows] = process.clean(prediction, noisy, levels)
        known = {at: clean[rows] for at, clean in cleans.items()}
        own = path.of(rows)
        if corrects and place > 0:
            noisy = step_from(own, place - 1, min(settings.order, place), corrects=True).take(settled[rows], known)
        settled[rows] = noisy
        latents[rows] = step_from(own, place, min(settings.order, place + 1)).take(noisy, known)
        cleans.pop(place - settings.order, None)
    return latents
