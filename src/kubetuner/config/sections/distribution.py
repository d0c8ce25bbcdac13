"""How the processes of a training run share the weights."""

from kubetuner.config.sections.base import Section


class FsdpSettings(Section):
    """FSDP2 (``fsdp_enable``): each process holds a part of every weight, gradient and optimizer state.

    Attributes:
        reshard_after_forward: ``fsdp_reshard_after_forward``: a block's weights are let go after its forward pass and
            gathered again for the backward pass; without it they stay, which is faster and needs more memory.
        wrap_blocks: Blocks are gathered one at a time (``fsdp_auto_wrap_policy`` ``TRANSFORMER_BASED_WRAP``), not the
            whole network at once (``NO_WRAP``).
        block_classes: ``fsdp_transformer_layer_cls_to_wrap``: classes of the blocks; empty for the network's own.
    """

    reshard_after_forward: bool = True
    wrap_blocks: bool = True
    block_classes: tuple[str, ...] = ()
