"""Adding, saving and loading an adapter; what is the same for all families."""

from enum import Enum
from pathlib import Path

from torch import nn

from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.errors import ArtifactError, InputError
from kubetuner.families import lora
from kubetuner.families.adapter_files import SavedAdapter, read_adapter, write_diffusers_file, write_peft_folder
from kubetuner.families.base import FamilyFacts


class Adapters:
    """The verbs of :class:`~kubetuner.families.base.Family` that concern adapters; the same for all families."""

    facts: FamilyFacts

    def add_adapter(self, denoiser: nn.Module, settings: LoraSettings) -> nn.Module:
        """The denoiser, frozen, with a float32 adapter that alone is trainable: fresh, or ``init_lora``'s.

        Raises:
            InputError: A target names no layer, a layer cannot have this adapter, or ``init_lora`` is another adapter.
            ArtifactError: ``init_lora`` is no adapter.
        """
        lora.inject_new(denoiser, settings, self.facts.lora_targets)
        if settings.init_lora:
            saved = read_adapter(Path(settings.init_lora), self.facts.denoiser)
            _check_start(saved, denoiser)
            _fill(denoiser, saved)
        return denoiser

    def save_adapter(self, folder: Path, denoiser: nn.Module) -> None:
        """Write the adapter so that stock diffusers or peft loads it, with its rank and alpha.

        A LoRA or DoRA becomes ``pytorch_lora_weights.safetensors`` where the family's pipeline has a loader for it. All
        else becomes a PEFT folder: diffusers' pipelines load no LoKr and no LoHa.
        """
        weights, metadata = lora.adapter_weights(denoiser), lora.adapter_metadata(denoiser)
        if self.facts.pipeline_loads_lora and metadata["peft_type"] == "LORA":
            write_diffusers_file(folder, weights, metadata, self.facts.denoiser)
        else:
            write_peft_folder(folder, weights, metadata)

    def load_adapter(self, denoiser: nn.Module, folder: Path) -> nn.Module:
        """The denoiser with the adapter of :meth:`save_adapter`.

        Raises:
            ArtifactError: A file is missing or damaged, or the adapter is of another base.
        """
        saved = read_adapter(folder, self.facts.denoiser)
        if saved.config is None:
            raise ArtifactError(f"{saved.where}: has no LoRA metadata, so its alpha is unknown. Train it again.")
        saved.config.inference_mode = False  # Otherwise peft freezes the loaded adapter.
        lora.inject(denoiser, saved.config)
        _fill(denoiser, saved)
        return denoiser


def _fill(denoiser: nn.Module, saved: SavedAdapter) -> None:
    from peft import set_peft_model_state_dict

    expected = lora.adapter_weights(denoiser)
    wrong = sorted(expected.keys() ^ saved.weights.keys()) or [
        name for name, tensor in saved.weights.items() if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise ArtifactError(
            f"{saved.where}: the adapter does not fit this base: {len(wrong)} tensors differ, the first is {wrong[0]}. "
            "Use the base that it was trained on."
        )
    set_peft_model_state_dict(denoiser, dict(saved.weights), adapter_name=lora.ADAPTER)


def _check_start(saved: SavedAdapter, denoiser: nn.Module) -> None:
    """``init_lora`` must be what the settings describe; a LoRA without metadata has the alpha that its rank has."""
    asked = lora.adapter_metadata(denoiser)
    names = ("peft_type", "r", "lora_alpha", "alpha", "use_dora", "decompose_factor", "decompose_both")
    given = _facts_of(saved)
    different = [
        f"{name} {_plain(given[name])} (asked for: {_plain(asked[name])})"
        for name in names
        if name in given and name in asked and given[name] != asked[name]
    ]
    if different:
        raise InputError(
            f"init_lora: {saved.where} is another adapter than the settings describe: {', '.join(different)}. "
            "Set them as the adapter has them."
        )


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


def _facts_of(saved: SavedAdapter) -> dict[str, object]:
    if saved.config is not None:
        return dict(saved.config.to_dict())
    ranks = [len(tensor) for name, tensor in saved.weights.items() if name.endswith("lora_A.weight")]
    rank = max(ranks, default=0)
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
