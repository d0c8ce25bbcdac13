"""``attention_mechanism``: which kernel computes softmax attention.

diffusers' ``set_attention_backend`` does nothing for these three denoisers, whose attention processors call PyTorch
directly; so the processors themselves are replaced. Sana's linear self-attention has no kernel to choose.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kubetuner.config.attention import PACKAGES, WITHOUT_MASKS, is_installed
from kubetuner.errors import InputError

_BACKENDS = {
    "native-math": "_native_math",
    "native-efficient": "_native_efficient",
    "native-flash": "_native_flash",
    "native-cudnn": "_native_cudnn",
    "xformers": "xformers",
    "flash-attn-2": "flash",
    "flash-attn-3": "_flash_3",
}
_ON_ANY_DEVICE = ("native-math", "native-flash")


def use_attention(denoiser: nn.Module, mechanism: str, device: torch.device) -> int:
    """Let ``denoiser`` compute softmax attention by ``mechanism``; returns the number of changed modules.

    Raises:
        InputError: The library is missing, or the mechanism needs a GPU.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0

    if mechanism == "diffusers":
        return 0
    if not is_installed(mechanism):
        raise InputError(
            f"attention_mechanism: {mechanism} needs the Python package {PACKAGES[mechanism]}, which is not installed; "
            "install it, or use 'diffusers', which takes the fastest kernel of PyTorch's own."
        )
    if device.type != "cuda" and mechanism not in _ON_ANY_DEVICE:
        raise InputError(f"attention_mechanism: {mechanism} runs on an NVIDIA GPU only, and there is none here.")
    backend = _BACKENDS[mechanism]
    masked = "native" if mechanism in WITHOUT_MASKS else backend
    changed = 0
    module: Any
    for module in denoiser.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, AttnProcessor2_0 | SanaAttnProcessor2_0):
            norm_heads = isinstance(processor, AttnProcessor2_0)
            module.processor = DispatchProcessor(backend, masked, norm_heads)
            changed += 1
    return changed


class DispatchProcessor:
    """Softmax attention over ``[B, tokens, D]`` by one of diffusers' backends.

    Args:
        backend: Name in ``diffusers.models.attention_dispatch``.
        masked_backend: The same where there is a mask: for the tokens of a padded caption.
        norm_heads: Whether queries and keys are normed per head or, as in Sana, over all heads.
    """

    def __init__(self, backend: str, masked_backend: str, norm_heads: bool) -> None:
        self._backend, self._masked_backend, self._norm_heads = backend, masked_backend, norm_heads

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What the processors of diffusers compute; ``temb`` is not used by these denoisers."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, heads = len(hidden_states), attn.heads
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        if not self._norm_heads:
            query, key = _normed(attn, query, key)
        query, key, value = (states.unflatten(-1, (heads, -1)) for states in (query, key, value))
        if self._norm_heads:
            query, key = _normed(attn, query, key)
        mask, backend = None, self._backend
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, context.shape[1], batch)
            mask = mask.view(batch, heads, -1, mask.shape[-1])
            backend = self._masked_backend
        result: Tensor = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)
        result = attn.to_out[0](result.flatten(2).to(query.dtype))
        output: Tensor = attn.to_out[1](result) / attn.rescale_output_factor
        return output


def _normed(attn: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return (
        query if attn.norm_q is None else attn.norm_q(query),
        key if attn.norm_k is None else attn.norm_k(key),
    )
