"""The network to train: loaded, with an adapter or not, and with the right parameters trainable."""

import torch
from torch import nn

from kubetuner.config.sections.steps import TrainSection
from kubetuner.errors import InputError
from kubetuner.families.attention import use_attention
from kubetuner.families.base import Family
from kubetuner.families.quantised import load_rounded
from kubetuner.training.randomness import derive_seed
from kubetuner.training.recompute import recompute_activations


def prepare_denoiser(section: TrainSection, family: Family, device: torch.device) -> nn.Module:
    """The network on ``device`` with its trainable parameters in float32.

    Raises:
        InputError: The adapter does not fit the network, BitFit finds no bias, or the attention needs something else.
    """
    return make_trainable(load_base(section, family, device), section, family, device)


def make_trainable(denoiser: nn.Module, section: TrainSection, family: Family, device: torch.device) -> nn.Module:
    """The loaded network as :func:`prepare_denoiser` gives it."""
    use_attention(denoiser, section.attention_mechanism, device)
    if family.facts.channels_last and device.type == "cuda":
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if section.gradient_checkpointing:
        recompute_activations(denoiser, section.gradient_checkpointing_interval)
    return choose_trained(denoiser, section, family)


def choose_trained(denoiser: nn.Module, section: TrainSection, family: Family) -> nn.Module:
    """The network, in place, with an adapter if the section has one; what is to be trained requires gradients."""
    if section.lora is not None:
        torch.manual_seed(derive_seed(section.seed, "adapter", 0, 0))
        return family.add_adapter(denoiser, section.lora)
    if section.layer_freeze_strategy == "bitfit":
        return _only_biases(denoiser)
    return denoiser.requires_grad_(True)


def load_base(section: TrainSection, family: Family, device: torch.device) -> nn.Module:
    """The network as it was published, or rounded to ``base_model_precision``.

    Under a bf16 adapter it is bf16, which halves its memory.

    An adapter that takes its start out of the base's weights (``olora``, ``pissa``) leaves a rest that bf16 would
    round away from what the saved adapter is loaded onto, so its base stays float32.
    BitFit keeps its frozen weights in float32 all the same: they are saved with the biases as one pipeline, and
    rounding them would change the published weights.
    """
    dtype = torch.bfloat16 if section.frozen_in_bf16 else torch.float32
    return load_rounded(
        lambda place: family.load_denoiser(section.model, place, dtype),
        section.base_model_precision,
        section.quantize_via,
        device,
    )


def _only_biases(denoiser: nn.Module) -> nn.Module:
    """Train what SimpleTuner's BitFit trains: the parameters with ``bias`` in their name."""
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_("bias" in name)
    if not any(parameter.requires_grad for parameter in denoiser.parameters()):
        raise InputError(
            f"layer_freeze_strategy: bitfit trains biases only, and {type(denoiser).__name__} has none; use 'none'."
        )
    return denoiser
