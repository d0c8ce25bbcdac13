"""``base_model_precision`` and text encoders': frozen linear layers in 8 or 4 bits, made after loading and in place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kubetuner.config.precision import missing_library
from kubetuner.config.sections.steps import ModelRef
from kubetuner.config.text_rounding import TextRounding, text_precision_key
from kubetuner.errors import InputError
from kubetuner.families import loading

_CPU = torch.device("cpu")


def load_rounded(
    load: Callable[[torch.device], nn.Module],
    precision: str,
    via: str,
    device: torch.device,
    key: str = "base_model_precision",
) -> nn.Module:
    """The frozen network that ``load`` puts on a device, rounded there or (``via`` ``cpu``) before it comes there."""
    if precision == "no_change" or via != "cpu":
        return quantise(load(device), precision, key)
    return quantise(load(_CPU), precision, key).to(device)


def load_text_encoder(
    part: Any, ref: ModelRef, subfolder: str, number: int, rounding: TextRounding, device: torch.device
) -> nn.Module:
    """The frozen text encoder ``number`` (from 1) in ``subfolder``, as ``rounding`` says."""
    return load_rounded(
        lambda place: loading.load_frozen(part, ref, subfolder, place),
        rounding.of(number), rounding.via, device, text_precision_key(number),
    )  # fmt: skip


def round_text_encoders(pipeline: Any, rounding: TextRounding) -> None:
    """Round the text encoders of a loaded diffusers pipeline, in place."""
    for number, precision in enumerate(rounding.precisions, 1):
        encoder = getattr(pipeline, "text_encoder" if number == 1 else f"text_encoder_{number}")
        load_rounded(encoder.to, precision, rounding.via, encoder.device, text_precision_key(number))


def quantise(denoiser: nn.Module, precision: str, key: str = "base_model_precision") -> nn.Module:
    """Round the weights of all linear layers of a frozen network; biases and convolutions stay as they are.

    Norms become float32: quantised layers may answer in float32, and PyTorch's group norm on a CPU refuses to mix that
    with narrower parameters.

    Raises:
        InputError: The library is missing.
    """
    if precision == "no_change":
        return denoiser
    distribution = missing_library(precision)
    if distribution:
        raise InputError(
            f"{key}: {precision} needs the Python package {distribution}, which is not installed; "
            "install kubetuner[quantised], or use 'no_change'."
        )
    denoiser.requires_grad_(False)
    if precision == "int8-torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(denoiser, Int8WeightOnlyConfig())
    elif precision == "int8-quanto":
        from optimum.quanto import freeze, qint8, quantize

        quantize(denoiser, weights=qint8)
        freeze(denoiser)
    else:
        _to_nf4(denoiser)
    for module in denoiser.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.float()
    return denoiser


def _to_nf4(denoiser: nn.Module) -> None:
    """Put bitsandbytes' layers in the place of PyTorch's; diffusers would do so on a GPU only.

    Layers that transformers wants in float32 stay: T5 turns what goes into one of them to the dtype of its weight,
    which for packed numbers is an integer.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    whole = getattr(denoiser, "_keep_in_fp32_modules", None) or ()
    found = [
        (parent, name, child)
        for parent in denoiser.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and name not in whole
    ]
    while found:  # Each layer is let go before the next is made, or a GPU would hold both networks.
        parent, name, old = found.pop()
        new: Any = Linear4bit(
            old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=old.weight.dtype,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        new.weight = Params4bit(
            old.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
        )
        new.bias = old.bias
        new.support_avx512bf16_for_cpu = False  # Its other layout for a CPU's inference fails on narrow layers.
        setattr(parent, name, new.to(old.weight.device))  # This is when it is rounded.
