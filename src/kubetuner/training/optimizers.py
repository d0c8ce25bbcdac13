"""The optimizer and gradient clipping."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from kubetuner.config.sections import TrainSection


def make_optimizer(section: TrainSection, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """AdamW in its fused form over ``parameters``; the loop sets its learning rate at each step."""
    return AdamW(
        parameters,
        lr=section.learning_rate,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        weight_decay=section.adam_weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Use ``rate`` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(section: TrainSection, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Clip in place; returns the size before clipping: the norm, or with ``value`` the largest absolute entry."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if section.grad_clip_method == "value":
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
        if section.max_grad_norm > 0:
            nn.utils.clip_grad_value_(parameters, section.max_grad_norm)
        return largest
    norm = torch.nn.utils.get_total_norm(gradients)
    if section.max_grad_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, section.max_grad_norm, norm)
    return norm
