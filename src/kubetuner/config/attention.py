"""``attention_mechanism``: the kernels to choose from, and what each needs; knows no torch."""

from importlib.util import find_spec

MECHANISMS = (
    "diffusers", "native-math", "native-efficient", "native-flash", "native-cudnn", "xformers", "flash-attn-2",
    "flash-attn-3",
)  # fmt: skip
PACKAGES = {"xformers": "xformers", "flash-attn-2": "flash_attn", "flash-attn-3": "flash_attn_interface"}
WITHOUT_MASKS = frozenset({"native-flash", "xformers", "flash-attn-2", "flash-attn-3"})
"""Used for attention without a mask only."""
HALF_ONLY = frozenset({"native-flash", "native-cudnn", "flash-attn-2", "flash-attn-3"})
"""Compute in half precision only (on a GPU)."""

_SAGE = "SageAttention has no backward pass, so nothing can be trained with it."
REFUSED = {
    name: _SAGE
    for name in (
        "sageattention", "sageattention-int8-fp16-cuda", "sageattention-int8-fp16-triton",
        "sageattention-int8-fp8-cuda",
    )
}  # fmt: skip


def is_installed(mechanism: str) -> bool:
    """Whether the mechanism's library is here; PyTorch's own kernels always are."""
    return mechanism not in PACKAGES or find_spec(PACKAGES[mechanism]) is not None
