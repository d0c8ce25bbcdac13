"""LoRA adapters through peft, injected in place: the denoiser keeps its class."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kubetuner.config.sections import LoraSettings
from kubetuner.errors import ArtifactError, InputError

ADAPTER = "default"
WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
METADATA_KEY = "lora_adapter_metadata"
PEFT_PREFIX = "base_model.model."


def add_lora(denoiser: nn.Module, settings: LoraSettings, default_targets: tuple[str, ...]) -> nn.Module:
    """The denoiser, frozen, with a fresh float32 LoRA that alone is trainable."""
    from peft import LoraConfig

    targets = settings.target_modules or default_targets
    _check_targets(denoiser, targets)
    alpha = int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=alpha,
        lora_dropout=settings.dropout,
        init_lora_weights="gaussian" if settings.init_type == "gaussian" else True,
        target_modules=sorted(targets),
    )
    return _inject(denoiser, config)


def lora_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """The LoRA's tensors under peft's names, float32 on CPU."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}


def lora_metadata(denoiser: nn.Module) -> dict[str, Any]:
    """The LoRA's configuration (rank, alpha, targets) as JSON values, the same for the same LoRA."""
    config: Any = denoiser.peft_config
    values = config[ADAPTER].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


@contextmanager
def without_adapter(denoiser: nn.Module) -> Iterator[None]:
    """The base model alone, in eval mode; afterwards the adapter and the mode are as before."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    was_training = denoiser.training
    denoiser.eval()
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)
        denoiser.train(was_training)


def save_peft_folder(folder: Path, denoiser: nn.Module) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` for ``PeftModel.from_pretrained``."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {PEFT_PREFIX + name: tensor for name, tensor in lora_weights(denoiser).items()}
    save_file(weights, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(lora_metadata(denoiser) | {"inference_mode": True}, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def load_peft_folder(denoiser: nn.Module, folder: Path) -> nn.Module:
    """The denoiser with the LoRA of :func:`save_peft_folder`."""
    from peft import LoraConfig

    _need(folder / PEFT_WEIGHTS)
    _need(folder / "adapter_config.json")
    weights = load_file(folder / PEFT_WEIGHTS)
    config = LoraConfig.from_pretrained(str(folder))
    return _fill(denoiser, config, {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in weights.items()}, folder)


def save_diffusers_file(folder: Path, denoiser: nn.Module, prefix: str) -> None:
    """Write what a diffusers pipeline's ``save_lora_weights`` writes, for its ``load_lora_weights``.

    diffusers would add ``"format": "pt"`` to the metadata; safetensors orders two entries at random, and the same
    LoRA would not be the same bytes. No loader of LoRAs asks for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"{prefix}.{name}": tensor for name, tensor in lora_weights(denoiser).items()}
    values = {f"{prefix}.{name}": value for name, value in lora_metadata(denoiser).items()}
    save_file(weights, folder / WEIGHTS, metadata={METADATA_KEY: json.dumps(values, indent=2, sort_keys=True)})


def load_diffusers_file(denoiser: nn.Module, folder: Path, prefix: str) -> nn.Module:
    """The denoiser with the LoRA of a diffusers ``save_lora_weights`` under ``prefix`` (``unet``, ``transformer``)."""
    from peft import LoraConfig

    path = _need(folder / WEIGHTS)
    with safe_open(path, framework="pt") as file:
        packed = (file.metadata() or {}).get(METADATA_KEY)
    if packed is None:
        raise ArtifactError(f"{path}: has no LoRA metadata, so its rank and alpha are unknown. Train it again.")
    start = f"{prefix}."
    values = {k.removeprefix(start): v for k, v in json.loads(packed).items() if k.startswith(start)}
    weights = {k.removeprefix(start): v for k, v in load_file(path).items() if k.startswith(start)}
    return _fill(denoiser, LoraConfig(**values), weights, path)


def _inject(denoiser: nn.Module, config: Any) -> nn.Module:
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
    return denoiser


def _fill(denoiser: nn.Module, config: Any, weights: dict[str, Tensor], where: Path) -> nn.Module:
    from peft import set_peft_model_state_dict

    config.inference_mode = False  # Otherwise peft freezes the loaded adapter.
    _inject(denoiser, config)
    expected = lora_weights(denoiser)
    wrong = sorted(expected.keys() ^ weights.keys()) or [
        name for name, tensor in weights.items() if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise ArtifactError(
            f"{where}: the adapter does not fit this base: {len(wrong)} tensors differ, the first is {wrong[0]}. "
            "Use the base that it was trained on."
        )
    set_peft_model_state_dict(denoiser, weights, adapter_name=ADAPTER)
    return denoiser


def _check_targets(denoiser: nn.Module, targets: tuple[str, ...]) -> None:
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers)]
    if missing:
        raise InputError(
            f"peft_lora_target_modules: got {', '.join(missing)}, which names no linear or convolution layer of "
            f"{type(denoiser).__name__}. It has: {', '.join(sorted({_short(name) for name in layers}))}."
        )


def _short(name: str) -> str:
    """The end of a layer's name that tells its role: ``to_q``, ``to_out.0``."""
    parts = name.split(".")
    keep = 1
    while parts[-keep].isdigit() and keep < len(parts):
        keep += 1
    return ".".join(parts[-keep:])


def _need(path: Path) -> Path:
    if not path.is_file():
        raise ArtifactError(f"{path}: there is no such file; the LoRA of this model artifact is incomplete.")
    return path
