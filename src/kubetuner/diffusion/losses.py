"""Losses: how far a prediction is from its target, and how much each noise level counts."""

import torch
from torch import Tensor

from kubetuner.config.sections.objective import LossSettings, Prediction


def snr_weights(loss: LossSettings, snr: Tensor, prediction: Prediction) -> Tensor:
    """The factor of each sample's loss, float32 ``[B]``.

    min-SNR (Hang et al. 2023, https://arxiv.org/abs/2303.09556) weights the error of the predicted picture with
    min(SNR, gamma), which is min(SNR, gamma) / SNR for a predicted noise and min(SNR, gamma) / (SNR + 1) for a
    predicted v. The soft form (Crowson et al. 2024, https://arxiv.org/abs/2401.11605) takes
    SNR * gamma / (SNR + gamma) in place of the minimum; SimpleTuner reads ``use_soft_min_snr`` and ignores it.

    Args:
        loss: The settings.
        snr: Signal-to-noise ratio abar / (1 - abar) of each sample, ``[B]``; 0 for pure noise.
        prediction: What the model says.
    """
    if not loss.snr_gamma and not loss.soft_sigma_data:
        return torch.full_like(snr, loss.snr_weight)
    soft = loss.soft_sigma_data > 0
    weights = 1 / (1 + snr * loss.soft_sigma_data**2) if soft else (loss.snr_gamma / snr).clamp(max=1)
    return weights if prediction == "epsilon" else weights * (snr / (snr + 1))


def huber_turns(loss: LossSettings, progress: Tensor, noise_to_signal: Tensor) -> Tensor:
    """``huber_c`` of each sample, float32 ``[B]``.

    ``exponential`` falls from 1 without noise to ``huber_c`` at the last level, ``snr`` is
    (1 - c) / (1 + sigma) ** 2 + c.

    Args:
        loss: The settings.
        progress: Noise level as a share of the levels, 0..1.
        noise_to_signal: Deviation of the noise over the signal's factor, from 0 to infinity.
    """
    match loss.huber_schedule:
        case "constant":
            return torch.full_like(noise_to_signal, loss.huber_c)
        case "exponential":
            return loss.huber_c ** progress.to(noise_to_signal.dtype)
        case "snr":
            return (1 - loss.huber_c) / (1 + noise_to_signal).square() + loss.huber_c


def sample_losses(
    loss: LossSettings,
    prediction: Tensor,
    target: Tensor,
    weights: Tensor,
    turns: Tensor,
    emphasis: Tensor | None = None,
) -> Tensor:
    """Weighted mean loss per sample, float32 ``[B]``.

    With difference d and c of ``turns``: ``l2`` is d², ``huber`` 2c(√(d² + c²) - c), ``smooth_l1`` 2(√(d² + c²) - c).
    ``emphasis`` ``[B, 1 or C, h, w]`` multiplies each element's loss before the mean, which still divides by the whole
    area: a picture of which a mask leaves half has half the say, as in SimpleTuner.
    """
    squares = (prediction.float() - target.float()).square()
    if loss.type != "l2":
        c = turns.reshape(-1, *[1] * (squares.ndim - 1))
        squares = 2 * ((squares + c.square()).sqrt() - c)
        if loss.type == "huber":
            squares = squares * c
    if emphasis is not None:
        squares = squares * emphasis
    return squares.flatten(1).mean(1) * weights
