"""Masked loss: whose mask is used in a step."""

import torch
from torch import Tensor

from kubetuner.training.randomness import generator


def draw_masks(probability: float, masks: Tensor, seed: int, step: int, micro: int) -> Tensor:
    """``masks`` ``[B, 1, h, w]``, each left as it is with ``probability`` and otherwise 1 everywhere.

    Every sample is drawn for by itself, so that a step is rarely all masked or all not; SimpleTuner draws once per
    batch, and only for ``conditioning_type: segmentation``. The draw depends on where it is made and on nothing else.
    """
    used = torch.rand(len(masks), generator=generator(seed, "masks", step, micro)) < probability
    return torch.where(used.reshape(-1, 1, 1, 1), masks, torch.ones(()))
