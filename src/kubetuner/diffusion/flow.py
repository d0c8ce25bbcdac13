"""Flow matching (Sana): continuous sigmas, velocity prediction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from kubetuner.config.sections.objective import FlowSchedule, LossSettings
from kubetuner.diffusion.losses import huber_turns, sample_losses
from kubetuner.diffusion.process import NoisySample, broadcast

_TIMESTEPS = 1000


@dataclass(frozen=True)
class AutoShift:
    """A shift that grows with the number of image tokens: exp(mu), mu on the line through two (tokens, mu) points.

    Attributes:
        patch: Latents per token and edge of the denoiser. Sana's is 1; SimpleTuner takes 2 for it.
        base_tokens: ``base_image_seq_len`` of the scheduler.
        max_tokens: ``max_image_seq_len``.
        base_mu: ``base_shift``.
        max_mu: ``max_shift``.
    """

    patch: int = 1
    base_tokens: int = 256
    max_tokens: int = 4096
    base_mu: float = 0.5
    max_mu: float = 1.15

    def shift(self, height: int, width: int) -> float:
        """The shift for latents of that size."""
        tokens = (height // self.patch) * (width // self.patch)
        slope = (self.max_mu - self.base_mu) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_mu + slope * (tokens - self.base_tokens))


@dataclass(frozen=True)
class FlowProcess:
    """Noises with ``(1 - sigma) * x + sigma * noise``; the target is ``noise - x``.

    Attributes:
        schedule: The density of the sigmas and their shift: ``logit_normal`` draws sigma =
            sigmoid(scale * (normal + offset)), ``uniform`` draws it evenly in 0..1, ``beta`` from Beta(alpha, beta).
        auto: Takes the place of ``schedule.shift``.
        scoring: The loss; levels have no SNR weights.
        offset: ``timestep_sampling_offset`` of ``logit_normal``, which no other density has a use for.
    """

    schedule: FlowSchedule = FlowSchedule()
    auto: AutoShift | None = None
    scoring: LossSettings = LossSettings()
    offset: float = 0.0

    def draw_levels(self, shape: Sequence[int], generator: Generator, before: int = 0) -> Tensor:
        """Sigmas float32 ``[B]``."""
        if self.schedule.sigmas:
            return self._of_list(shape[0], generator, before)
        shift = self.schedule.shift if self.auto is None else self.auto.shift(shape[-2], shape[-1])
        sigmas = self._draw(shape[0], generator)
        return sigmas if shift <= 0 else shift * sigmas / (1 + (shift - 1) * sigmas)

    def eval_levels(self, count: int) -> Tensor:
        """Sigmas float32 ``[count]`` at the middles of ``count`` equal bins, ascending; not shifted."""
        return (torch.arange(count, dtype=torch.float32) + 0.5) / count

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> NoisySample:
        """Noise ``latents`` at sigmas ``levels``."""
        levels = levels.to(latents.device, torch.float32)
        sigma = broadcast(levels, latents)
        noisy = (1 - sigma) * latents + sigma * noise
        weights = torch.full_like(levels, self.scoring.snr_weight)
        turns = huber_turns(self.scoring, levels, levels / (1 - levels))
        return NoisySample(noisy, self.timesteps(levels), noise - latents, weights, turns)

    def loss(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """Weighted loss per sample."""
        return sample_losses(self.scoring, prediction, sample.target, sample.weights, sample.turns, sample.emphasis)

    def as_target(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """The prediction: it is the flow."""
        return prediction

    def clean(self, prediction: Tensor, noisy: Tensor, levels: Tensor) -> Tensor:
        """The latents at the other end of the flow."""
        return noisy - broadcast(levels.float(), noisy) * prediction

    def rates(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """1 - sigma and sigma."""
        sigma = levels.double()
        return 1 - sigma, sigma

    def timesteps(self, levels: Tensor) -> Tensor:
        """1000 sigma."""
        return levels * _TIMESTEPS

    def room(self, levels: Tensor) -> Tensor:
        """Up to sigma 0.999, as pure noise says nothing about the picture; none without any noise."""
        above = ((1 - 1 / _TIMESTEPS - levels.double()) * _TIMESTEPS).floor().long().clamp(min=0)
        return above * (levels > 0)

    def noisier(self, levels: Tensor, steps: Tensor) -> Tensor:
        """A timestep is a thousandth of sigma, the same anywhere: the shift moves where levels are drawn only.

        SimpleTuner mixes sigma = t / 999 with the scheduler's table.
        """
        return levels + steps.to(levels.dtype) / _TIMESTEPS

    def _of_list(self, count: int, generator: Generator, before: int) -> Tensor:
        sigmas = torch.tensor(self.schedule.sigmas)
        if self.schedule.in_turn:
            return sigmas[(before + torch.arange(count)) % len(sigmas)]
        return sigmas[torch.randint(len(sigmas), (count,), generator=generator)]

    def _draw(self, count: int, generator: Generator) -> Tensor:
        match self.schedule.density:
            case "uniform":
                return torch.rand(count, generator=generator)
            case "logit_normal":
                normal = torch.randn(count, generator=generator) + self.offset
                return torch.sigmoid(self.schedule.sigmoid_scale * normal)
            case "beta":  # torch draws from it with its global generator only.
                seed = int(torch.randint(2**62, (), generator=generator))
                drawn = np.random.default_rng(seed).beta(self.schedule.beta_alpha, self.schedule.beta_beta, count)
                return torch.from_numpy(drawn).float()
