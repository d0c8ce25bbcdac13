"""ReflexFlow: how a flow's loss answers to the drift of a rollout (Huang et al. 2025, https://arxiv.org/abs/2512.04904).

SimpleTuner weights an element with 1 + alpha * d / sum of |d|, where d is what the rollout took from its prediction.
Over the tens of thousands of elements of a latent that is 1 to four decimals, and less than 1 where d is negative. Here
it is 1 + alpha * |d| / mean of |d|: elements count more the more the rollout changed them, by alpha on average.
"""

import torch
from torch import Tensor


def emphasis(alpha: float, exact: Tensor, drifted: Tensor) -> Tensor:
    """The factor of each element's loss, ``[B, C, h, w]``.

    Args:
        alpha: Mean of what is added to 1.
        exact: Prediction for latents with exact noise, ``[B, C, h, w]``.
        drifted: Prediction for the rolled-out latents; where it is the same throughout a sample, all factors are 1.
    """
    change = (exact - drifted).abs()
    mean = change.mean(dim=(1, 2, 3), keepdim=True)
    return 1 + alpha * torch.where(mean > 0, change / mean, 0)


def turning(prediction: Tensor, noisy: Tensor, latents: Tensor) -> Tensor:
    """Squared distance 0..4 of two directions, ``[B]``: the predicted one, and from the picture to ``noisy``."""
    return (_direction(prediction) - _direction(noisy - latents)).square().sum(1)


def _direction(tensor: Tensor) -> Tensor:
    return torch.nn.functional.normalize(tensor.float().flatten(1), dim=1)
