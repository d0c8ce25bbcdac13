"""Where a diffusion model's prediction says that a path begins and ends: the latents without noise, and the noise.

Noisy latents are ``signal * latents + spread * noise``. ``signal`` and ``spread`` are ``[B]``, float64.
"""

from torch import Tensor

from kubetuner.config.sections.objective import Prediction
from kubetuner.diffusion.process import broadcast


def clean_latents(kind: Prediction, prediction: Tensor, noisy: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
    """The latents without noise, ``[B, C, h, w]``; not finite where ``signal`` is 0 and the noise was predicted."""
    a, b = _factors(noisy, signal, spread)
    return (noisy - b * prediction) / a if kind == "epsilon" else a * noisy - b * prediction


def predicted_noise(kind: Prediction, prediction: Tensor, noisy: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
    """The noise, ``[B, C, h, w]``."""
    a, b = _factors(noisy, signal, spread)
    return prediction if kind == "epsilon" else a * prediction + b * noisy


def flow(kind: Prediction, prediction: Tensor, noisy: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
    """The straight way from the latents to the noise: noise - latents."""
    ends = (kind, prediction, noisy, signal, spread)
    return predicted_noise(*ends) - clean_latents(*ends)


def _factors(like: Tensor, signal: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    return broadcast(signal.to(like.dtype), like), broadcast(spread.to(like.dtype), like)
