"""The fixed-noise evaluation loss: the same samples, noise levels and noise every time, so only the model differs.

Every sample is noised at the same evenly spread levels, each time with noise seeded from (dataset, sample, level).
The denoiser is in eval mode, captions are never dropped, and the loss is the plain mean squared error, without the
weights that training may put on levels. Two models, or two runs with the same held-out data, can be compared.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kubetuner.diffusion.process import NoiseProcess
from kubetuner.evaluation.held_out import HeldOut, HeldOutSample
from kubetuner.families.base import Family
from kubetuner.progress import Progress

BANDS = ("low", "middle", "high")
LEVELS_AT_ONCE = 4


@dataclass(frozen=True)
class LevelLoss:
    """Mean loss of all samples at one noise level, as the process counts it (timestep or sigma)."""

    level: float
    loss: float


@dataclass(frozen=True)
class EvalLoss:
    """One model's evaluation loss; means are unweighted over (sample, level).

    Attributes:
        mean: Over everything.
        bands: Over the third of the levels with least, middle and most noise; :data:`BANDS`.
        datasets: Per dataset.
        levels: Per level, from least to most noise.
        samples: How many samples it was measured on.
    """

    mean: float
    bands: dict[str, float]
    datasets: dict[str, float]
    levels: tuple[LevelLoss, ...]
    samples: int

    @property
    def finite(self) -> bool:
        """Whether it is a number; a broken model's is not."""
        return math.isfinite(self.mean)


@dataclass(frozen=True)
class Measurement:
    """What stays the same from model to model.

    Attributes:
        family: Collates conditioning and predicts.
        process: Adds the noise.
        num_levels: Noise levels per sample.
        bf16: Predict under bfloat16 autocast, as in training with ``mixed_precision: bf16``.
    """

    family: Family
    process: NoiseProcess
    num_levels: int
    bf16: bool


def evaluation_loss(measurement: Measurement, denoiser: nn.Module, held_out: HeldOut, label: str) -> EvalLoss:
    """Measure ``denoiser`` on ``held_out``; leaves its train/eval mode and the global random state as they were.

    Args:
        measurement: What stays the same from model to model.
        denoiser: The model, on the device to compute on.
        held_out: At least one sample.
        label: Names the model in the progress lines.
    """
    levels = measurement.process.eval_levels(measurement.num_levels).sort().values
    was_training = denoiser.training
    denoiser.eval()
    try:
        with Progress(f"evaluation loss {label}", len(held_out.samples) * len(levels), "predictions") as progress:
            losses = []
            for sample in held_out.samples:
                losses.append(_sample_losses(measurement, denoiser, sample, held_out, levels))
                progress.advance(len(levels))
    finally:
        denoiser.train(was_training)
    return _means(held_out, levels, torch.stack(losses).double())


def noise_seed(dataset: str, sample: str, level: int) -> int:
    """Seed of the noise of ``sample`` at the ``level``-th level; the same on every machine and in every version."""
    digest = hashlib.sha256(f"{dataset}\n{sample}\n{level}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def band_of(rank: int, count: int) -> str:
    """The band of the level that is ``rank``-th from least noise, of ``count``."""
    return BANDS[(2 * rank + 1) * len(BANDS) // (2 * count)]


@torch.no_grad()
def _sample_losses(
    measurement: Measurement, denoiser: nn.Module, sample: HeldOutSample, held_out: HeldOut, levels: Tensor
) -> Tensor:
    """Mean squared error per level, ``[L]`` on CPU."""
    device = next(denoiser.parameters()).device
    losses = []
    for indices in _chunks(len(levels)):
        size = len(indices)
        latents = sample.latents.expand(size, *sample.latents.shape)
        noise = torch.stack([_noise(sample, index) for index in indices])
        noisy = measurement.process.add_noise(latents.to(device), noise.to(device), levels[indices].to(device))
        conditioning = measurement.family.collate([sample.text] * size, held_out.null, [sample.row] * size)
        conditioning = {name: tensor.to(device) for name, tensor in conditioning.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=measurement.bf16):
            prediction = measurement.family.predict(denoiser, noisy.noisy_latents, noisy.timesteps, conditioning)
        losses.append((prediction.float() - noisy.target.float()).square().flatten(1).mean(1).cpu())
    return torch.cat(losses)


def _chunks(count: int) -> Iterator[list[int]]:
    for start in range(0, count, LEVELS_AT_ONCE):
        yield list(range(start, min(start + LEVELS_AT_ONCE, count)))


def _noise(sample: HeldOutSample, level: int) -> Tensor:
    generator = torch.Generator().manual_seed(noise_seed(sample.row.dataset, sample.row.sample, level))
    return torch.randn(sample.latents.shape, generator=generator)


def _means(held_out: HeldOut, levels: Tensor, losses: Tensor) -> EvalLoss:
    """Average ``losses`` ``[S, L]``."""
    count = len(levels)
    columns: dict[str, list[int]] = defaultdict(list)
    for rank in range(count):
        columns[band_of(rank, count)].append(rank)
    rows: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(held_out.samples):
        rows[sample.row.dataset].append(index)
    per_level = losses.mean(0)
    return EvalLoss(
        mean=losses.mean().item(),
        bands={name: losses[:, chosen].mean().item() for name, chosen in columns.items()},
        datasets={name: losses[chosen].mean().item() for name, chosen in rows.items()},
        levels=tuple(LevelLoss(levels[rank].item(), per_level[rank].item()) for rank in range(count)),
        samples=len(held_out.samples),
    )
