"""What operations do on a GPU and not on a CPU, as far as memory goes, for tensors that only pretend to compute."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_NARROWED = frozenset(
    {
        "linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm",
        "addmm", "baddbmm", "einsum",
    }
)  # fmt: skip
"""PyTorch's "CUDA ops that can autocast to float16", as far as a network may use them."""
_WIDENED = frozenset(
    {
        "pow", "__pow__", "__rpow__", "__rdiv__", "__rtruediv__", "exp", "expm1", "log", "log1p", "log2", "rsqrt",
        "reciprocal", "softmax", "log_softmax", "softplus", "layer_norm", "group_norm", "rms_norm", "norm", "normalize",
        "sum", "prod", "cumsum", "cumprod", "cosine_similarity", "mse_loss", "l1_loss", "smooth_l1_loss",
    }
)  # fmt: skip
"""Those "that can autocast to float32"."""


class GpuRules(TorchFunctionMode):
    """Autocast, fused attention and fused dropout, as on a GPU; for tensors on the ``meta`` device, which have none.

    As autocast does, it casts a trained weight once and keeps the cast, for as long as this object lives.

    Args:
        bf16: Whether there is autocast (``mixed_precision``).
        math_attention: Attention keeps all its scores (``attention_mechanism: native-math``).
    """

    def __init__(self, *, bf16: bool, math_attention: bool = False) -> None:
        super().__init__()
        self._bf16, self._math_attention = bf16, math_attention
        self._casts: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, or what a GPU would run."""
        kwargs = kwargs or {}
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        name = getattr(func, "__name__", "") if self._bf16 else ""
        if name in _NARROWED:
            args, kwargs = tree_map(self._narrowed, (args, kwargs))
        elif name in _WIDENED:
            args, kwargs = tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        if self._bf16:
            query, key, value = self._narrowed(query), self._narrowed(key), self._narrowed(value)
        if self._math_attention:
            scores = query @ key.transpose(-1, -2)
            scores = scores if attn_mask is None else scores + attn_mask.to(scores.dtype)
            return torch.softmax(scores, -1).to(value.dtype) @ value
        result: Tensor = _FusedAttention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
        return result

    def _narrowed(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if value not in self._casts:
            self._casts[value] = value.to(torch.bfloat16)
        return self._casts[value]


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """A GPU keeps one byte per number; PyTorch's CPU way keeps a number of ``x``'s own width."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class _FusedAttention(torch.autograd.Function):
    """Flash or memory-efficient attention: kept are its inputs, its result and one float32 per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, sums, mask)
        return result

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors[:3]
        collected = query.new_empty(query.shape, dtype=torch.float32)  # The query's gradient is summed up in float32.
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del collected
        return *found, None
