"""Adapters on disk: a LoRA file as diffusers' pipelines write it, or a PEFT folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kubetuner.artifacts import ADAPTER_FILES
from kubetuner.errors import ArtifactError

WEIGHTS, PEFT_WEIGHTS, PEFT_CONFIG = ADAPTER_FILES
METADATA_KEY = "lora_adapter_metadata"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class SavedAdapter:
    """What was read.

    Attributes:
        where: The file or folder.
        config: Its peft configuration; ``None`` for a LoRA file without metadata.
        weights: Its tensors under peft's names.
    """

    where: Path
    config: Any
    weights: Mapping[str, Tensor]


def write_peft_folder(folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` for ``PeftModel.from_pretrained``."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {PEFT_PREFIX + name: tensor for name, tensor in weights.items()}
    save_file(named, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    text = json.dumps({**metadata, "inference_mode": True}, indent=2, sort_keys=True)
    (folder / PEFT_CONFIG).write_text(text + "\n", encoding="utf-8")


def write_diffusers_file(folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any], prefix: str) -> None:
    """Write what a diffusers pipeline's ``save_lora_weights`` writes, for its ``load_lora_weights``.

    diffusers would add ``"format": "pt"`` to the metadata; safetensors orders two entries at random, and the same
    LoRA would not be the same bytes. No loader of LoRAs asks for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{prefix}.{name}": tensor for name, tensor in weights.items()}
    values = {f"{prefix}.{name}": value for name, value in metadata.items()}
    save_file(named, folder / WEIGHTS, metadata={METADATA_KEY: json.dumps(values, indent=2, sort_keys=True)})


def read_adapter(path: Path, prefix: str) -> SavedAdapter:
    """The adapter in a PEFT folder, in a folder with a LoRA file of diffusers', or in such a file.

    Args:
        path: The folder or file.
        prefix: Part of the pipeline in a LoRA file: ``unet`` or ``transformer``.

    Raises:
        ArtifactError: A file is missing or is no adapter.
    """
    if path.is_file() and path.name != PEFT_WEIGHTS:
        return _read_file(path, prefix)
    folder = path.parent if path.is_file() else path
    if (folder / PEFT_CONFIG).is_file() or (folder / PEFT_WEIGHTS).is_file():
        return _read_folder(folder)
    return _read_file(_need(folder / WEIGHTS), prefix)


def _read_folder(folder: Path) -> SavedAdapter:
    from peft import PeftConfig

    weights = _tensors(_need(folder / PEFT_WEIGHTS), PEFT_PREFIX)
    config = PeftConfig.from_pretrained(str(_need(folder / PEFT_CONFIG).parent))
    return SavedAdapter(folder, config, weights)


def _read_file(path: Path, prefix: str) -> SavedAdapter:
    from peft import LoraConfig

    start = f"{prefix}."
    weights = _tensors(path, start)
    with safe_open(path, framework="pt") as file:
        packed = (file.metadata() or {}).get(METADATA_KEY)
    values = {name.removeprefix(start): value for name, value in json.loads(packed or "{}").items()}
    return SavedAdapter(path, LoraConfig(**values) if values else None, weights)


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path}: is not a safetensors file ({error}).") from error
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not found:
        raise ArtifactError(
            f"{path}: no tensor's name begins with {prefix!r} (the first is {min(tensors, default='none')!r}); "
            "expected an adapter in diffusers' or PEFT's format for this model family."
        )
    return found


def _need(path: Path) -> Path:
    if not path.is_file():
        raise ArtifactError(f"{path}: there is no such file; the adapter is incomplete.")
    return path
