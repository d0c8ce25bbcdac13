"""FSDP2: weights of which each process holds a part.

The other modules of training see a sharded weight only through these functions. For any other tensor, they give back
what they were given, so one process's run is what it would be without them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from kubetuner.config.sections.distribution import FsdpSettings
from kubetuner.errors import InputError


def shard(denoiser: nn.Module, settings: FsdpSettings) -> None:
    """Shard every parameter, in place; the blocks of the chosen classes are gathered one at a time.

    Raises:
        InputError: ``fsdp_transformer_layer_cls_to_wrap`` names a class that the network does not have.
    """
    from torch.distributed.fsdp import fully_shard

    names = _block_classes(denoiser, settings)
    for module in reversed(list(denoiser.modules())):  # Inner blocks before the outer ones that hold them.
        if type(module).__name__ in names:
            fully_shard(module, reshard_after_forward=settings.reshard_after_forward)
    fully_shard(denoiser)


def part(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``."""
    return cast(Any, tensor).to_local() if _is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded ``tensor``; all processes must ask."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if _is_sharded(tensor) else tensor


def collect(held: Mapping[str, Tensor], like: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors, on the CPU where they are sharded; without ``keep`` they are dropped. All processes must ask.

    Args:
        held: By name, a sharded tensor or what this process holds of one that is shared out like that in ``like``.
        like: Parameters by name.
        keep: Whether this process is the one that uses the result.
    """
    collected: dict[str, Tensor] = {}
    for name, tensor in held.items():
        shared: Any = like[name]
        if not _is_sharded(shared):
            collected[name] = tensor
            continue
        if not _is_sharded(tensor):
            mesh, placements = shared.device_mesh, shared.placements
            placed = tensor.to(shared.device)
            tensor = type(shared.data).from_local(placed, mesh, placements, shape=shared.shape, stride=shared.stride())
        whole = full(tensor.detach())
        if keep:
            collected[name] = whole.cpu()
    return collected


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, shared out like ``like``."""
    if not _is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shared: Any = like
    placed = tensor.to(device=shared.device)
    return distribute_tensor(placed, shared.device_mesh, shared.placements, src_data_rank=None)


def collect_state(optimizer: Optimizer, keep: bool) -> dict[str, Any]:
    """The optimizer's ``state_dict`` with whole tensors; all must call it. Without ``keep`` they are dropped."""
    state = optimizer.state_dict()
    if not any(_is_sharded(value) for held in state["state"].values() for value in held.values()):
        return state
    made: dict[Any, dict[str, Any]] = {position: {} for position in state["state"]}
    for position, held in state["state"].items():
        for name, value in held.items():
            gathered = full(value).cpu() if isinstance(value, Tensor) else value
            made[position][name] = gathered if keep else None
    return state | {"state": made}


def spread_state(state: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """An optimizer's ``state_dict`` of whole tensors, shared out like the ``parameters`` that it is of."""
    made = {
        position: {
            name: spread(value, parameters[position])
            if isinstance(value, Tensor) and value.shape == parameters[position].shape
            else value
            for name, value in held.items()
        }
        for position, held in state["state"].items()
    }
    return dict(state) | {"state": made}


def _is_sharded(value: object) -> bool:
    """Whether it is a DTensor, whose class takes half a second to import."""
    return hasattr(value, "device_mesh")


def _block_classes(denoiser: nn.Module, settings: FsdpSettings) -> frozenset[str]:
    """Classes of the blocks; by default those that diffusers does not split over devices."""
    if not settings.wrap_blocks:
        return frozenset()
    if not settings.block_classes:
        return frozenset(cast(Any, denoiser)._no_split_modules or ())
    have = {type(module).__name__ for module in denoiser.modules() if module is not denoiser}
    missing = sorted(set(settings.block_classes) - have)
    if missing:
        raise InputError(
            f"fsdp_transformer_layer_cls_to_wrap: {type(denoiser).__name__} has no {', '.join(missing)}; it has "
            f"{', '.join(sorted(have))}."
        )
    return frozenset(settings.block_classes)
