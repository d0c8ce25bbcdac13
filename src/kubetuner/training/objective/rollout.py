"""Rollouts in training: which samples are rolled out, and the loss of a batch that has arrived."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kubetuner.config.sections.objective import RolloutSettings
from kubetuner.diffusion.process import NoiseProcess, NoisySample
from kubetuner.diffusion.reflex import emphasis, turning
from kubetuner.diffusion.rollout import Ask, Departure, offsets, probability, roll_out
from kubetuner.training.randomness import generator


@dataclass(frozen=True)
class Arrival:
    """A batch after its rollout.

    Attributes:
        exact: As it was noised.
        drifted: With the noisy latents that the model made; of samples that did not move they are the exact ones.
        departure: Where it came from.
    """

    exact: NoisySample
    drifted: NoisySample
    departure: Departure


def draw_steps(settings: RolloutSettings, room: Tensor, seed: int, step: int, micro: int) -> list[int]:
    """Timesteps that each sample is rolled out, at most ``room`` ``[B]``; by the position alone."""
    chance, length = torch.rand(2, len(room), generator=generator(seed, "rollout", step, micro), dtype=torch.float64)
    chosen = chance < probability(settings, step)
    steps: list[int] = (torch.minimum(offsets(settings, length), room) * chosen).tolist()
    return steps


@contextmanager
def as_in_inference(denoiser: nn.Module) -> Iterator[None]:
    """Without gradients and dropout, as pictures are drawn; the errors to learn from are those made there."""
    was_training = denoiser.training
    denoiser.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        denoiser.train(was_training)


def arrive(
    settings: RolloutSettings, process: NoiseProcess, departure: Departure, exact: NoisySample, ask: Ask
) -> Arrival:
    """Roll ``exact`` out; for ReflexFlow also ask for both predictions that it compares."""
    drifted = replace(exact, noisy_latents=roll_out(settings, process, departure, ask))
    if settings.reflex is not None and settings.reflex.alpha:
        rows = departure.moving(0)
        weights = torch.ones_like(exact.noisy_latents)
        answers = [ask(sample.noisy_latents[rows], sample.timesteps[rows], rows) for sample in (exact, drifted)]
        weights[rows] = emphasis(settings.reflex.alpha, *answers)
        if exact.emphasis is not None:
            weights = weights * exact.emphasis
        drifted = replace(drifted, emphasis=weights)
    return Arrival(exact, drifted, departure)


def arrival_losses(settings: RolloutSettings, process: NoiseProcess, arrival: Arrival, prediction: Tensor) -> Tensor:
    """Loss per sample ``[B]`` of the prediction for the drifted latents; ReflexFlow's terms for those that moved."""
    losses = process.loss(prediction, arrival.drifted)
    reflex = settings.reflex
    if reflex is None:
        return losses
    moved = torch.tensor([steps > 0 for steps in arrival.departure.steps], device=losses.device)
    exact = arrival.exact
    latents = process.clean(exact.target, exact.noisy_latents, arrival.departure.levels[-1])
    turned = reflex.loss_weight * losses + reflex.drift_weight * turning(
        prediction, arrival.drifted.noisy_latents, latents
    )
    return torch.where(moved, turned, losses)
