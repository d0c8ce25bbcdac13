"""Variance-preserving diffusion (PixArt Sigma, SDXL): discrete timesteps, epsilon or v prediction."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from kubetuner.config.sections.objective import LossSettings, Prediction, TimestepBias
from kubetuner.diffusion.endpoints import clean_latents, flow
from kubetuner.diffusion.losses import huber_turns, sample_losses, snr_weights
from kubetuner.diffusion.process import NoisySample, broadcast


@dataclass(frozen=True)
class EpsilonProcess:
    """Noises with ``sqrt(abar) * x + sqrt(1 - abar) * noise``.

    Attributes:
        alphas_cumprod: abar of every timestep, float32 ``[T]`` on CPU, from the base's scheduler.
        segmented: Spread the timesteps of a batch over segments of equal probability instead of drawing independently.
            SimpleTuner's segments are equally long and overlap by one timestep; ours do not.
        prediction: What the model says: the noise, or v = sqrt(abar) * noise - sqrt(1 - abar) * x.
        bias: Timesteps that are drawn more or less often. Drawn in segments they keep exactly that bias; SimpleTuner
            biases only inside each segment, so that ``later`` with a portion of one segment changes nothing.
        scoring: The loss.
    """

    alphas_cumprod: Tensor
    segmented: bool = True
    prediction: Prediction = "epsilon"
    bias: TimestepBias = TimestepBias()
    scoring: LossSettings = LossSettings()

    def draw_levels(self, shape: Sequence[int], generator: Generator, before: int = 0) -> Tensor:
        """Timesteps int64 ``[B]``; segmented ones walk from the noisiest segment down."""
        steps, batch_size = len(self.alphas_cumprod), shape[0]
        uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        if self.segmented:
            uniform = (torch.arange(batch_size - 1, -1, -1, dtype=torch.float64) + uniform) / batch_size
        ends = timestep_weights(self.bias, steps).cumsum(0)
        return torch.searchsorted(ends, uniform * ends[-1], right=True).clamp(max=steps - 1)

    def eval_levels(self, count: int) -> Tensor:
        """Timesteps int64 ``[count]`` at the middles of ``count`` equal bins, ascending."""
        return ((torch.arange(count, dtype=torch.float64) + 0.5) / count * len(self.alphas_cumprod)).long()

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> NoisySample:
        """Noise ``latents`` at timesteps ``levels``."""
        levels = levels.cpu()
        abar = self.alphas_cumprod[levels]
        signal = broadcast(abar.sqrt(), latents)
        spread = broadcast((1 - abar).sqrt(), latents)
        noisy = signal * latents + spread * noise
        if self.scoring.diff2flow:
            target = noise - latents
        else:
            target = noise if self.prediction == "epsilon" else signal * noise - spread * latents
        weights = snr_weights(self.scoring, abar / (1 - abar), self.prediction)
        turns = huber_turns(self.scoring, levels / len(self.alphas_cumprod), ((1 - abar) / abar).sqrt())
        return NoisySample(
            noisy, levels.to(latents.device), target, weights.to(latents.device), turns.to(latents.device)
        )

    def loss(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """Weighted loss per sample."""
        said = self.as_target(prediction, sample)
        return sample_losses(self.scoring, said, sample.target, sample.weights, sample.turns, sample.emphasis)

    def as_target(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """The prediction itself, or with ``diff2flow`` the flow that it stands for.

        For a predicted noise that multiplies its error by (a + b) / a, with a and b the factors of latents and noise:
        1.03 at SDXL's first timestep, 16 at its last, 158 at PixArt's; for a predicted v by a + b, which is 1..1.42.
        """
        if not self.scoring.diff2flow:
            return prediction
        return flow(self.prediction, prediction, sample.noisy_latents, *self.rates(sample.timesteps))

    def clean(self, prediction: Tensor, noisy: Tensor, levels: Tensor) -> Tensor:
        """The latents that ``prediction`` (noise or v) stands for."""
        return clean_latents(self.prediction, prediction, noisy, *self.rates(levels))

    def rates(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar)."""
        abar = self.alphas_cumprod.to(levels.device)[levels].double()
        return abar.sqrt(), (1 - abar).sqrt()

    def timesteps(self, levels: Tensor) -> Tensor:
        """The levels are the timesteps."""
        return levels

    def room(self, levels: Tensor) -> Tensor:
        """Up to the last timestep, or the one before it where that one is pure noise."""
        last = int((self.alphas_cumprod > 0).sum()) - 1
        return (last - levels).clamp(min=0)

    def noisier(self, levels: Tensor, steps: Tensor) -> Tensor:
        """Timesteps are counted singly."""
        return levels + steps


def timestep_weights(bias: TimestepBias, steps: int) -> Tensor:
    """How often each timestep is drawn, relative to the others, float64 ``[steps]``; timestep 0 has least noise."""
    weights = torch.ones(steps, dtype=torch.float64)
    count = max(1, int(bias.portion * steps))
    chosen = {
        "none": slice(0, 0),
        "earlier": slice(0, count),
        "later": slice(steps - count, steps),
        "range": slice(bias.begin, bias.end),
    }[bias.strategy]
    weights[chosen] *= bias.multiplier
    return weights
