"""The model card: front matter for the hub, and a page for people.

Only settings named here enter the card, so that paths, tokens and other secrets of a configuration cannot.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Literal

from kubetuner.artifacts import EvaluationArtifact, ModelArtifact, ValidationImage
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.base import Section
from kubetuner.config.sections.objective import FlowSchedule, LossSettings, NoiseSettings, TimestepBias
from kubetuner.config.sections.steps import PushSection
from kubetuner.families.base import FamilyFacts

Usage = Literal["pipeline", "lora", "peft"]

_TRAINING = {
    "max_train_steps": "Steps",
    "num_train_epochs": "Epochs",
    "learning_rate": "Learning rate",
    "lr_scheduler": "Schedule",
    "lr_warmup_steps": "Warmup steps",
    "max_grad_norm": "Max grad norm",
    "grad_clip_method": "Gradient clipping",
    "train_batch_size": "Micro batch size",
    "gradient_accumulation_steps": "Gradient accumulation steps",
    "gradient_checkpointing": "Gradient checkpointing",
    "optimizer": "Optimizer",
    "adam_weight_decay": "Weight decay",
    "mixed_precision": "Mixed precision",
    "base_model_precision": "Base model precision",
    "caption_dropout_probability": "Caption dropout probability",
    "seed": "Seed",
}
_SCHEDULER = {
    "prediction_type": "Prediction type",
    "rescale_betas_zero_snr": "Zero terminal SNR",
    "timestep_spacing": "Sampler's timestep spacing",
}
_LORA = {
    "rank": "LoRA rank",
    "alpha": "LoRA alpha",
    "dropout": "LoRA dropout",
    "init_type": "LoRA initialisation",
    "target_modules": "LoRA target modules",
}
_LYCORIS = {"rank": "Rank", "alpha": "Alpha", "rank_dropout": "Rank dropout", "module_dropout": "Module dropout"}
_LYCORIS_TARGETS = {"target_classes": "Target module classes"}
_LOKR = {"factor": "Factor", "decompose_both": "Both blocks decomposed"}
_GROUPS: dict[str, tuple[str, Section | None]] = {
    "loss": ("Loss", LossSettings()),
    "noise": ("Training noise", NoiseSettings()),
    "timestep_bias": ("Timestep bias", TimestepBias()),
    "flow": ("Flow schedule", FlowSchedule()),
    "rollout": ("Scheduled sampling", None),
    "ema": ("Averaged weights (EMA)", None),
    "optimizer_options": ("Optimizer options", None),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def render_card(
    section: PushSection,
    model: ModelArtifact,
    evaluation: EvaluationArtifact,
    gallery: Sequence[ValidationImage],
    facts: FamilyFacts,
    usage: Usage,
) -> str:
    """The text of ``README.md``.

    Args:
        section: Whose ``training`` holds the settings of the train section.
        model: The published model.
        evaluation: Its evaluation.
        gallery: The evaluation's pictures, with paths as in the published folder.
        facts: Constants of the family.
        usage: How diffusers loads what is published.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(  # Markdown and YAML: values are quoted by the filters below, HTML escapes would be wrong
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False
    )
    environment.filters["quoted"] = _quoted
    environment.filters["cell"] = _cell
    repo = section.hub_model_id or f"{model.family}-{model.model_type}"
    on_hub = is_hub_id(model.base_model)
    template = environment.from_string(files("kubetuner.publishing").joinpath("model_card.jinja").read_text("utf-8"))
    return template.render(
        facts=facts,
        model=model,
        base_on_hub=on_hub,
        base_text=f"[{model.base_model}](https://huggingface.co/{model.base_model})"
        if on_hub
        else "a local base model",
        tags=_tags(section, model, usage),
        title=repo.split("/")[-1],
        repo=repo,
        note=section.note,
        gallery=gallery,
        validation=_validation(evaluation),
        training=_training(section, model),
        kind=_kind(json.loads(section.training), model),
        scheduler=", ".join(f"{name}={value!r}" for name, value in section.model.scheduler.settings().items()),
        usage=usage,
    )


def is_hub_id(name: str) -> bool:
    """Whether a base model is named by a hub id and not by a folder."""
    return _HUB_ID.fullmatch(name) is not None


def _tags(section: PushSection, model: ModelArtifact, usage: Usage) -> list[str]:
    family = model.family.replace("_", "-")
    tags = [family, f"{family}-diffusers", "text-to-image", "diffusers", "kubetuner", model.model_type]
    if usage != "pipeline":
        tags.append("template:sd-lora")
    tags.append("safe-for-work" if section.safe_for_work else "not-for-all-audiences")
    return tags


def _validation(evaluation: EvaluationArtifact) -> list[tuple[str, str]]:
    rows = []
    sizes = sorted({(image.width, image.height) for image in evaluation.images})
    if sizes:
        rows.append(("Resolutions", ", ".join(f"{width}x{height}" for width, height in sizes)))
        rows.append(("Seeds", ", ".join(str(seed) for seed in sorted({image.seed for image in evaluation.images}))))
    before, after = evaluation.eval_loss_before, evaluation.eval_loss_after
    if before is not None and after is not None:
        rows.append(("Evaluation loss", f"{before:.4f} before training, {after:.4f} after"))
    scores = [
        (image.clip_score_before, image.clip_score_after)
        for image in evaluation.images
        if image.clip_score_before is not None and image.clip_score_after is not None
    ]
    if scores:
        means = [sum(column) / len(scores) for column in zip(*scores, strict=True)]
        rows.append(("Mean CLIP score", f"{means[0]:.2f} before training, {means[1]:.2f} after"))
    return rows or [("Held-out data and prompts", "none")]


def _training(section: PushSection, model: ModelArtifact) -> list[tuple[str, str]]:
    settings = json.loads(section.training)
    rows = [("Optimizer steps taken", str(model.steps))]
    rows.append(
        (
            "Training loss",
            f"{model.first_loss:.4f} over the first tenth of the steps, {model.last_loss:.4f} over the last",
        )
    )
    sizes, datasets = _batch_sizes(settings), _datasets(settings)
    rows += _chosen(settings | {"train_batch_size": sizes}, _TRAINING)
    rows += _chosen(section.model.scheduler.settings(), _SCHEDULER)
    rows += _groups(settings)
    if model.num_processes > 1:
        rows.append(("Processes", str(model.num_processes)))
    accumulated = settings.get("gradient_accumulation_steps")
    if sizes and isinstance(accumulated, int):
        effective = [size * accumulated * model.num_processes for size in (sizes[0], sizes[-1])]
        rows.append(("Effective batch size", " to ".join(str(size) for size in dict.fromkeys(effective))))
    if isinstance(settings.get("lora"), dict):
        rows += _adapter(settings["lora"])
    rows += [(f"Dataset {entry.get('id')}", _dataset(entry)) for entry in datasets]
    return rows


def _datasets(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in settings.get("datasets", ()) if isinstance(entry, dict)]


def _batch_sizes(settings: Mapping[str, Any]) -> list[int]:
    """The different sizes of batches, ascending; none where the settings do not say."""
    usual = settings.get("train_batch_size")
    found = {entry.get("train_batch_size") or usual for entry in _datasets(settings)} or {usual}
    return sorted(size for size in found if isinstance(size, int))


def _dataset(entry: Mapping[str, object]) -> str:
    """How often a dataset was seen, and what it has of its own."""
    said = [f"{entry.get('repeats', 0)} repeats"]
    if size := entry.get("train_batch_size"):
        said.append(f"micro batch size {size}")
    if offset := entry.get("timestep_sampling_offset"):
        said.append(f"timestep sampling offset {offset}")
    return ", ".join(said)


def _adapter(settings: Mapping[str, object]) -> list[tuple[str, str]]:
    adapter = LoraSettings.model_validate(settings)
    if adapter.algorithm == "lora":
        return [("Adapter", adapter.title), *_chosen(settings, _LORA)]
    names = _LYCORIS | (_LOKR if adapter.algorithm == "lokr" else {}) | _LYCORIS_TARGETS
    return [("Adapter", adapter.title), *_chosen(settings, names)]


def _kind(settings: Mapping[str, object], model: ModelArtifact) -> str:
    """What the model is, before "of" or "for" its base."""
    if model.model_type == "lora":
        lora = settings.get("lora")
        return f"{LoraSettings.model_validate(lora).title if isinstance(lora, dict) else 'LoRA'} adapter for"
    if settings.get("layer_freeze_strategy") == "bitfit":
        return "fine-tune of all biases (BitFit) of"
    return "full fine-tune of"


def _chosen(settings: Mapping[str, object], names: Mapping[str, str]) -> list[tuple[str, str]]:
    """The settings in ``names`` that say something: a limit of 0 is one that was not used."""
    unused_at_zero = {"max_train_steps", "num_train_epochs"}
    return [
        (title, _text(settings[key]))
        for key, title in names.items()
        if key in settings and not (key in unused_at_zero and not settings[key]) and settings[key] not in ([], ())
    ]


def _groups(settings: Mapping[str, object]) -> list[tuple[str, str]]:
    """The groups of settings that were chosen, with what differs from the default."""
    rows = []
    for name, (title, default) in _GROUPS.items():
        values, usual = settings.get(name), {} if default is None else default.model_dump(mode="json")
        if isinstance(values, dict):
            chosen = [
                f"{key} {_text(value)}" for key, value in values.items() if key not in usual or usual[key] != value
            ]
            rows += [(title, ", ".join(chosen))] if chosen else []
    return rows


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return f"({', '.join(f'{key} {_text(item)}' for key, item in value.items())})"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)


def _quoted(value: str) -> str:
    """A double-quoted string in YAML, JSON and Python alike."""
    return json.dumps(value, ensure_ascii=False)


def _cell(value: str) -> str:
    """Text that cannot break a table row or smuggle in markup."""
    return " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
