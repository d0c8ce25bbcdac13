"""Gradient checkpointing of every n-th block: its activations are computed again instead of being kept."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import checkpoint

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Makes the surroundings of a block's first run, and of its repetition in the backward pass."""


def recompute_activations(denoiser: nn.Module, interval: int, contexts: Contexts | None = None) -> None:
    """Turn on gradient checkpointing for the first, the (1 + ``interval``)-th and so on of the denoiser's blocks.

    diffusers has no interval, but asks a function to run each block, with the block as its first argument. Blocks are
    counted in the order in which they first run, and known by identity afterwards, so that running a block again in
    the backward pass cannot shift the count.
    """
    order: dict[int, int] = {}

    def run(block: Any, *inputs: Any) -> Any:
        position = order.setdefault(id(block), len(order))
        if position % interval:
            return block(*inputs)
        if contexts is None:  # torch.compile cannot trace a function that makes contexts, not even one that makes none.
            return checkpoint(block, *inputs, use_reentrant=False)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

    cast(Any, denoiser).enable_gradient_checkpointing(run)
