"""Linear layers of 8 and 4 bits without numbers: what each library stores and, for the backward pass, keeps.

They run on tensors that have a shape and no contents, so that memory can be counted without the library or a GPU.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kubetuner.config.precision import BYTES

_BLOCK_BYTES = 1 / 64 + 4 / (64 * 256)
"""Of nf4's scales, per weight: one byte for 64 of them, and four for 256 such blocks."""


def outline_quantised(denoiser: nn.Module, precision: str) -> nn.Module:
    """Put a stand-in in the place of each linear layer of a frozen network; see :mod:`kubetuner.families.quantised`."""
    if precision == "no_change":
        return denoiser
    denoiser.requires_grad_(False)
    found = [
        (parent, name, child)
        for parent in denoiser.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    for parent, name, old in found:
        setattr(parent, name, _Rounded(old, precision))
    for module in denoiser.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.float()
    return denoiser


class _Rounded(nn.Linear):
    """A linear layer that multiplies by a whole copy of its rounded weight, made when it is needed."""

    def __init__(self, old: nn.Linear, precision: str) -> None:
        super().__init__(old.in_features, old.out_features, bias=False, device="meta")
        size = old.weight.numel() * BYTES[precision]
        scales = old.weight.numel() * _BLOCK_BYTES if precision == "nf4-bnb" else 2 * old.out_features
        self.whole, self.precision = old.weight.dtype, precision
        self.weight = nn.Parameter(torch.empty(int(size), dtype=torch.uint8, device="meta"), requires_grad=False)
        self.register_buffer("scales", torch.empty(int(scales), dtype=torch.uint8, device="meta"))
        self.bias = old.bias

    def forward(self, x: Tensor) -> Tensor:
        """The product, by way of the library's own memory."""
        if self.precision == "int8-torchao":  # The copy is part of the graph, and is kept with it.
            product: Tensor = F.linear(x, self.weight.view(self.out_features, -1).to(x.dtype))
        else:
            product = _Product.apply(x.to(self.whole), self)  # type: ignore[no-untyped-call]
        if self.precision == "nf4-bnb":  # The bias is added on the way, and the answer is as wide as the question.
            return product.to(x.dtype)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """A product whose backward pass makes the copy of the weight again; quanto keeps the input too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Rounded) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*([x] if layer.precision == "int8-quanto" else []))
        return F.linear(x, _copy(layer, x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ _copy(ctx.layer, gradient), None


def _copy(layer: _Rounded, like: Tensor) -> Tensor:
    return like.new_empty(layer.out_features, layer.in_features)
