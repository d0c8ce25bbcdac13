"""Solvers of the way down from noise, one step at a time, for samples that are each at a level of their own.

All are exponential multistep methods in lambda = log(signal / spread) on predictions of the clean latents. Their step
from here to there is

    x' = spread' / spread * x + gain * (clean + sum of share[p] * (clean[p] - clean)),  gain = signal' * (1 - e^-h),

with h = lambda' - lambda and one share for each further point p at which there is a prediction. Without further points
that is ``euler``: DDIM for a diffusion model, and for a flow Euler's step in sigma. ``dpm`` is DPM-Solver++(2M)
(Lu et al. 2022, https://arxiv.org/abs/2211.01095), whose further point is the one before. ``unipc`` is UniPC's second
variant (Zhao et al. 2023, https://arxiv.org/abs/2302.04867): the same step, which is taken once more, with the
prediction at its end among the points, as soon as that prediction is known.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kubetuner.diffusion.process import broadcast


@dataclass(frozen=True)
class Path:
    """Levels that samples go through, from the noisiest on.

    Attributes:
        signal: Factor of the latents, above 0, float64 ``[N, B]`` on CPU.
        spread: Factor of the noise, above 0.
    """

    signal: Tensor
    spread: Tensor

    def of(self, rows: list[int]) -> "Path":
        """The path of some of the samples."""
        return Path(self.signal[:, rows], self.spread[:, rows])


@dataclass(frozen=True)
class Step:
    """One step: what is kept of the latents, and the weights of the predictions by their points' places on the path.

    All are ``[B]``, float64 on CPU.
    """

    kept: Tensor
    weights: Mapping[int, Tensor]

    def take(self, latents: Tensor, cleans: Mapping[int, Tensor]) -> Tensor:
        """``latents`` ``[B, C, h, w]`` after the step."""
        moved = _factor(self.kept, latents) * latents
        for place, weight in self.weights.items():
            moved = moved + _factor(weight, latents) * cleans[place]
        return moved


def step_from(path: Path, place: int, order: int, corrects: bool = False) -> Step:
    """The step from ``place`` on the path to the next one.

    Args:
        path: The whole path.
        place: Where the step begins; predictions at it and at the ``order - 1`` places before it are known.
        order: 1..3.
        corrects: Whether the prediction at its end is known too.
    """
    ratio = torch.log(path.signal / path.spread)
    width = ratio[place + 1] - ratio[place]
    gain = -path.signal[place + 1] * torch.expm1(-width)
    further = [place + 1] * corrects + [place - back for back in range(1, order)]
    weights = {place: gain}
    if further:
        distances = torch.stack([(ratio[other] - ratio[place]) / width for other in further])
        shares = _shares(distances, width)
        weights = {place: gain * (1 - shares.sum(0))}
        weights |= {other: gain * share for other, share in zip(further, shares, strict=True)}
    return Step(path.spread[place + 1] / path.spread[place], weights)


def _shares(distances: Tensor, width: Tensor) -> Tensor:
    """The shares of further points ``[n, B]`` at ``distances`` in widths of the step, behind it below 0.

    They make the step exact for polynomials in lambda; a single point has the half that its authors give it, which
    is what that tends to for short steps.
    """
    if len(distances) == 1:
        return 0.5 / distances
    fall = torch.expm1(-width)
    phi, powers, moments = fall / -width - 1, [], []
    for power in range(len(distances)):
        powers.append(distances**power)
        moments.append(phi * math.factorial(power + 1) / fall)
        phi = phi / -width - 1 / math.factorial(power + 2)
    solved: Tensor = torch.linalg.solve(torch.stack(powers).permute(2, 0, 1), torch.stack(moments).T)
    return solved.T / distances


def _factor(values: Tensor, like: Tensor) -> Tensor:
    return broadcast(values.to(like.dtype), like)
