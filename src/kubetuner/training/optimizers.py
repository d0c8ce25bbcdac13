"""The optimizer by its SimpleTuner name, and gradient clipping."""

import importlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Optimizer

from kubetuner.config.optimizers import OPTIMIZERS, OptimizerName
from kubetuner.config.sections.steps import TrainSection
from kubetuner.errors import InputError
from kubetuner.training.distributed.sharding import full

_SIMPLE = {"adam_weight_decay": "weight_decay", "adam_epsilon": "eps"}
_BNB = {"adamw": "AdamW", "adamw8bit": "AdamW8bit", "lion": "Lion", "lion8bit": "Lion8bit"}
_AO = {"ao-adamw8bit": "AdamW8bit", "ao-adamw4bit": "AdamW4bit", "ao-adamwfp8": "AdamWFp8"}


def make_optimizer(section: TrainSection, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """The section's optimizer over ``parameters``; the loop sets its learning rate at each step.

    Raises:
        InputError: Its library is not installed, or it needs a GPU and there is none.
    """
    settings = _settings(section)
    match section.optimizer:
        case "torch-adamw":
            return AdamW(parameters, **{"fused": True, **settings})
        case "torch-adafactor":
            return Adafactor(parameters, **settings)
        case "prodigy":
            return _library("prodigyopt", section.optimizer, "Prodigy")(parameters, **settings)
        case "optimi-adamw" | "optimi-lion" | "optimi-stableadamw":
            names = {"optimi-adamw": "AdamW", "optimi-lion": "Lion", "optimi-stableadamw": "StableAdamW"}
            return _library("optimi", section.optimizer, names[section.optimizer])(parameters, **settings)
    if parameters and not parameters[0].is_cuda:
        raise InputError(
            f"optimizer: {section.optimizer} needs an NVIDIA GPU, and this run computes on "
            f"{parameters[0].device.type}; use torch-adamw or optimi-lion here."
        )
    if section.optimizer in _AO:
        return _library("torchao.optim", section.optimizer, _AO[section.optimizer])(parameters, **settings)
    name = section.optimizer.removeprefix("bnb-")
    paged = "Paged" if name.endswith("-paged") else ""
    made = _library("bitsandbytes.optim", section.optimizer, paged + _BNB[name.removesuffix("-paged")])
    return made(parameters, **settings)


def _settings(section: TrainSection) -> dict[str, Any]:
    """The constructor's arguments: only those that the optimizer takes."""
    taken = OPTIMIZERS[section.optimizer].defaults
    settings: dict[str, Any] = {"lr": section.learning_rate}
    if "adam_beta1" in taken:
        settings["betas"] = (section.adam_beta1, section.adam_beta2)
    settings |= {theirs: getattr(section, ours) for ours, theirs in _SIMPLE.items() if ours in taken}
    return settings | section.optimizer_options


_PACKAGES = {
    "prodigyopt": "prodigyopt",
    "optimi": "torch-optimi",
    "bitsandbytes.optim": "bitsandbytes",
    "torchao.optim": "torchao",
}


def _library(module: str, optimizer: OptimizerName, name: str) -> type[Optimizer]:
    """The class ``name`` of an optional library."""
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise InputError(
            f"optimizer: {optimizer} needs {_PACKAGES[module]}, which cannot be imported ({error}); "
            f"install it with pip install {_PACKAGES[module]}, or use torch-adamw."
        ) from error
    return cast(type[Optimizer], found)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Use ``rate`` in the next step; torchao keeps it in a tensor, which must stay one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip_gradients(section: TrainSection, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Clip in place; returns the size before clipping: the norm, or with ``value`` the largest absolute entry.

    The size is that of the whole gradient, also where each process holds a part of it.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if section.grad_clip_method == "value":
        largest = full(torch.nn.utils.get_total_norm(gradients, norm_type=float("inf")))
        if section.max_grad_norm > 0:
            nn.utils.clip_grad_value_(parameters, section.max_grad_norm)
        return largest
    norm = full(torch.nn.utils.get_total_norm(gradients))
    if section.max_grad_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, section.max_grad_norm, norm)
    return norm
