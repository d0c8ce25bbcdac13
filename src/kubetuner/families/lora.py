"""LoRA, DoRA, LoKr and LoHa through peft, injected in place: the denoiser keeps its class."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.errors import InputError

ADAPTER = "default"
_START_A, _START_B = "start_A", "start_B"


def inject_new(denoiser: nn.Module, settings: LoraSettings, default_targets: tuple[str, ...]) -> nn.Module:
    """The denoiser, frozen, with a fresh float32 adapter that alone is trainable.

    ``olora`` and ``pissa`` take what they start from out of the base's weights; the start is kept in the adapted
    layers, so that :func:`adapter_weights` can give an adapter for the untouched base.

    Raises:
        InputError: A target names no layer, or a layer cannot have this adapter.
    """
    targets = _targets(denoiser, settings, default_targets)
    _check_layers(targets, settings)
    names = sorted(targets if settings.target_classes else settings.target_modules or default_targets)
    inject(denoiser, _config(settings, names))
    created = sorted(_adapted(denoiser))
    if created != sorted(targets):
        raise InputError(
            f"peft_lora_target_modules: {len(targets)} layers of {type(denoiser).__name__} were to be adapted and "
            f"{len(created)} were; the first that differs is {min(set(created) ^ set(targets))}. "
            "Name whole layers, like to_q or ff.net.2."
        )
    if settings.init_type in ("olora", "pissa"):
        for layer in _adapted(denoiser).values():
            layer.register_buffer(_START_A, layer.lora_A[ADAPTER].weight.detach().clone(), persistent=False)
            layer.register_buffer(_START_B, layer.lora_B[ADAPTER].weight.detach().clone(), persistent=False)
    return denoiser


def inject(denoiser: nn.Module, config: Any) -> None:
    """Freeze the denoiser and add the adapter of a peft configuration, trainable and in float32."""
    from peft import inject_adapter_in_model

    denoiser.requires_grad_(False)
    add: Any = getattr(denoiser, "add_adapter", None)
    if add is not None:
        add(config, adapter_name=ADAPTER)
    else:  # PixArt's transformer has no adapter mixin in diffusers.
        inject_adapter_in_model(config, denoiser, adapter_name=ADAPTER)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def adapter_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names, float32 on CPU, for the untouched base.

    Where the adapter started from the base's weights its rank is twice the trained one: B A - B0 A0 = [B, -B0] [A; A0].
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    weights = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    for name, layer in _adapted(denoiser).items():
        if hasattr(layer, _START_A):
            a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            weights[a] = torch.cat([weights[a], layer.start_A.float().cpu()])
            weights[b] = torch.cat([weights[b], -layer.start_B.float().cpu()], dim=1)
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def adapter_metadata(denoiser: nn.Module) -> dict[str, Any]:
    """The adapter's configuration (rank, alpha, targets) as JSON values, the same for the same adapter."""
    configs: Any = denoiser.peft_config
    values = configs[ADAPTER].to_dict()
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    if any(hasattr(layer, _START_A) for layer in _adapted(denoiser).values()):
        values |= {"r": 2 * values["r"], "lora_alpha": 2 * values["lora_alpha"], "init_lora_weights": True}
    return values


@contextmanager
def without_adapter(denoiser: nn.Module) -> Iterator[None]:
    """The base model alone, in eval mode; afterwards the adapter and the mode are as before.

    Where the adapter started from the base's weights these hold the rest only: its start makes them whole.
    """
    layers = _adapted(denoiser).values()
    was_training = denoiser.training
    denoiser.eval()
    hooks = [layer.register_forward_hook(_add_start) for layer in layers if hasattr(layer, _START_A)]
    for layer in layers:
        # peft's own method takes the adapter's gradients away too, which weights that FSDP2 has gathered would keep.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        for hook in hooks:
            hook.remove()
        denoiser.train(was_training)


def _config(settings: LoraSettings, names: list[str]) -> Any:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    alpha = int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha
    if settings.algorithm == "lora":
        return LoraConfig(
            r=settings.rank,
            lora_alpha=alpha,
            lora_dropout=settings.dropout,
            init_lora_weights=True if settings.init_type == "default" else settings.init_type,
            use_dora=settings.use_dora,
            target_modules=names,
        )
    shared: dict[str, Any] = {
        "r": settings.rank,
        "alpha": alpha,
        "rank_dropout": settings.rank_dropout,
        "module_dropout": settings.module_dropout,
        "use_effective_conv2d": settings.tucker,
        "target_modules": names,
    }
    if settings.algorithm == "loha":
        return LoHaConfig(**shared)
    return LoKrConfig(
        **shared,
        init_weights="lycoris",
        decompose_both=settings.decompose_both,
        decompose_factor=settings.factor,
    )


def _adapted(denoiser: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}


def _add_start(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """What a layer's weights lack, to its output."""
    start = functional.linear(functional.linear(inputs[0].to(layer.start_A.dtype), layer.start_A), layer.start_B)
    whole: Tensor = output + start * layer.scaling[ADAPTER]
    return whole.to(output.dtype)


def _targets(denoiser: nn.Module, settings: LoraSettings, default_targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The layers to adapt, by name."""
    layers: dict[str, nn.Module] = {
        name: part for name, part in denoiser.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)
    }
    if settings.target_classes:
        return _inside_classes(denoiser, layers, settings.target_classes)
    targets = settings.target_modules or default_targets
    found = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets}
    missing = [target for target, names in found.items() if not names]
    if missing:
        raise InputError(
            f"peft_lora_target_modules: got {', '.join(missing)}, which names no linear or convolution layer of "
            f"{type(denoiser).__name__}. It has: {', '.join(sorted({_short(name) for name in layers}))}."
        )
    return {name: layers[name] for names in found.values() for name in names}


def _inside_classes(
    denoiser: nn.Module, layers: dict[str, nn.Module], classes: tuple[str, ...]
) -> dict[str, nn.Module]:
    blocks: dict[str, list[str]] = {}
    for name, part in denoiser.named_modules():
        if name and name not in layers:
            blocks.setdefault(type(part).__name__, []).append(name)
    inside = {
        kind: {layer: layers[layer] for layer in layers if any(layer.startswith(f"{name}.") for name in names)}
        for kind, names in blocks.items()
    }
    missing = [kind for kind in classes if not inside.get(kind)]
    if missing:
        known = sorted(kind for kind, held in inside.items() if held and not kind.startswith("ModuleList"))
        raise InputError(
            f"lycoris_config: target_module names {', '.join(missing)}, of which {type(denoiser).__name__} has none "
            f"with a linear or convolution layer. It has: {', '.join(known)}."
        )
    return {layer: part for kind in classes for layer, part in inside[kind].items()}


def _check_layers(targets: dict[str, nn.Module], settings: LoraSettings) -> None:
    """Refuse what peft would refuse half-way, or would give a layer of another shape."""
    for name, layer in targets.items():
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
        if grouped and settings.algorithm == "lora" and settings.rank % getattr(layer, "groups", 1):
            raise InputError(
                f"peft_lora_target_modules: {name} is a convolution in {getattr(layer, 'groups', 1)} groups, whose "
                f"LoRA needs a rank that this divides; lora_rank is {settings.rank}. Leave this layer out."
            )
        if settings.init_type not in ("olora", "pissa"):
            continue
        if not isinstance(layer, nn.Linear):
            raise InputError(
                f"lora_init_type: {settings.init_type} factorises a matrix, and {name} is a convolution; "
                "leave it out of peft_lora_target_modules or use 'default' or 'gaussian'."
            )
        if layer.weight.dtype != torch.float32:
            raise InputError(
                f"lora_init_type: {settings.init_type} takes a part out of the base's weights, and what is left in "
                f"{name} would be rounded to {layer.weight.dtype}: the adapter would be right on no published base. "
                "Use a float32 base, or 'default' or 'gaussian'."
            )
        if settings.rank > min(layer.in_features, layer.out_features):
            raise InputError(
                f"lora_init_type: {settings.init_type} cannot find {settings.rank} directions in {name}, which is "
                f"{layer.out_features}x{layer.in_features}; lower lora_rank to its smaller edge."
            )


def _short(name: str) -> str:
    """The end of a layer's name that tells its role: ``to_q``, ``to_out.0``."""
    parts = name.split(".")
    keep = 1
    while parts[-keep].isdigit() and keep < len(parts):
        keep += 1
    return ".".join(parts[-keep:])
