"""``base_model_precision``: the frozen base's linear layers in 8 or 4 bits, made after loading and in place."""

from typing import Any

from torch import nn

from kubetuner.config.precision import missing_library
from kubetuner.errors import InputError


def quantise(denoiser: nn.Module, precision: str) -> nn.Module:
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
            f"base_model_precision: {precision} needs the Python package {distribution}, which is not installed; "
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
    """Put bitsandbytes' layers in the place of PyTorch's; diffusers would do so on a GPU only."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    found = [
        (parent, name, child)
        for parent in denoiser.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
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
