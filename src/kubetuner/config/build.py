"""Checked values of ``config.json`` and the datasets to one section per step, with the checks between keys."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kubetuner.config.attention import HALF_ONLY, WITHOUT_MASKS
from kubetuner.config.build_objective import ObjectiveReader
from kubetuner.config.compilation import read_compilation
from kubetuner.config.data_file.entries import Data
from kubetuner.config.data_file.sampling import offset_fault
from kubetuner.config.keys import Values
from kubetuner.config.models import OUTLINES, FamilyOutline
from kubetuner.config.optimizers import OPTIMIZERS, OptimizerName, plain_settings, read_options
from kubetuner.config.precision import unroundable
from kubetuner.config.prompts import read_instruction, read_prompts, read_resolutions
from kubetuner.config.run_file.adapters import LORA_KEYS, read_adapter
from kubetuner.config.run_file.distribution import check_fsdp, read_fsdp
from kubetuner.config.run_file.learning_rate import read_rate
from kubetuner.config.schedule import empty_stages
from kubetuner.config.sections.base import DEFAULT_SEED
from kubetuner.config.sections.objective import FlowSchedule, SchedulerChange
from kubetuner.config.sections.sources import DownloadSection
from kubetuner.config.sections.steps import (
    CacheTextSection,
    CacheVaeSection,
    EvaluateSection,
    FamilyName,
    ModelRef,
    ModelType,
    PushSection,
    Sections,
    TrainSection,
)
from kubetuner.config.text_rounding import TextRounding, read_text_rounding
from kubetuner.errors import Problem

DEFAULT_JUDGE = "openai/clip-vit-large-patch14-336"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SANA_KEYS = (
    "flow_schedule_shift", "flow_sigmoid_scale", "flow_use_uniform_schedule", "sana_complex_human_instruction",
)  # fmt: skip
_TRAIN_KEYS = (
    "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision", "lr_scheduler",
    "lr_warmup_steps", "lr_end", "lr_power", "lr_num_cycles", "grad_clip_method", "caption_dropout_probability",
    "disable_segmented_timestep_sampling", "seed", "checkpoint_step_interval", "checkpoint_epoch_interval",
    "checkpoints_total_limit",
    "resume_from_checkpoint", "log_step_interval", "data_backend_sampling", "layer_freeze_strategy",
    "gradient_checkpointing_interval", "attention_mechanism", "base_model_precision", "masked_loss_probability",
    "num_train_processes", "num_machines", "quantize_via",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """What all sections are built from."""

    family: FamilyName
    outline: FamilyOutline
    model: ModelRef
    model_type: ModelType
    values: Values
    instruction: str
    objective: ObjectiveReader
    scheduler: SchedulerChange
    flow: FlowSchedule
    rounding: TextRounding

    @property
    def scheduled_model(self) -> ModelRef:
        """The model for the steps that noise latents or draw pictures; the caches' bytes do not depend on it."""
        return self.model.model_copy(update={"scheduler": self.scheduler})


def read_base(values: Values, where: str, cwd: Path, problems: list[Problem]) -> Base | None:
    """The model and what all sections share; ``None`` without a valid family and model type."""
    family = next((name for name in OUTLINES if name == values.text("model_family")), None)
    if family is None or "model_type" not in values:
        return None
    outline = OUTLINES[family]
    model_type: ModelType = "lora" if values.text("model_type") == "lora" else "full"
    _refuse_foreign(values, family, model_type, where, problems)
    path = _model_path(values, outline, where, problems)
    objective = ObjectiveReader(values, outline.flow, where, problems)
    objective.refuse_foreign()
    sana = family == "sana"
    return Base(
        family=family,
        outline=outline,
        model=ModelRef(
            family=family,
            path=path,
            revision=values.text("revision"),
            variant=values.text("variant"),
            vae_path=values.text("pretrained_vae_model_name_or_path"),
        ),
        model_type=model_type,
        values=values,
        instruction=read_instruction(values, where, cwd, problems) if sana else "",
        objective=objective,
        scheduler=objective.scheduler(),
        flow=objective.flow_schedule(),
        rounding=read_text_rounding(values, outline.text_encoders, where, problems),
    )


def _refuse_foreign(values: Values, family: str, model_type: str, where: str, problems: list[Problem]) -> None:
    """Keys that the chosen family or model type does not use; they would be ignored."""

    def refuse(names: Sequence[str], reason: str) -> None:
        problems.extend(Problem(f"{where}.{name}", f"{reason}; remove it.") for name in names if name in values)

    if model_type == "full":
        refuse(LORA_KEYS, "has no effect with model_type full")
    elif values.text("layer_freeze_strategy") == "bitfit":
        refuse(("layer_freeze_strategy",), "has no effect with model_type lora, which freezes the whole base")
    if family != "sana":
        refuse(_SANA_KEYS, f"has no effect with model_family {family}, which trains no flow and takes no instruction")
    else:
        refuse(
            ("pretrained_vae_model_name_or_path",), "is not possible for sana, whose autoencoder is part of the model"
        )
        refuse(
            ("disable_segmented_timestep_sampling",),
            "has no effect with model_family sana, which draws noise levels singly",
        )
        refuse(
            ("vae_cache_moments",), "is not possible for sana, whose autoencoder gives one latent and no distribution"
        )
        if values.text("vae_dtype") == "bf16":
            problems.append(Problem(f"{where}.vae_dtype", "is 'bf16'; sana's latents are always 'fp32'."))
    if family != "pixart_sigma":
        refuse(("tokenizer_max_length",), f"has no effect with model_family {family}, whose length is fixed")
    elif values.integer("tokenizer_max_length", 1) > 300:
        problems.append(Problem(f"{where}.tokenizer_max_length", "is above 300, the most PixArt Sigma takes."))


def _model_path(values: Values, outline: FamilyOutline, where: str, problems: list[Problem]) -> str:
    path = values.text("pretrained_model_name_or_path")
    flavour = values.text("model_flavour")
    place = f"{where}.model_flavour"
    if not flavour:
        return path or next(iter(outline.flavours.values()))
    if flavour in outline.later:
        problems.append(Problem(place, f"is {flavour!r}; training of stages and refiners is not available yet."))
    elif flavour not in outline.flavours:
        problems.append(Problem(place, f"is {flavour!r}; expected one of {', '.join(outline.flavours)}."))
    elif path and path.lower() != outline.flavours[flavour].lower():
        message = (
            f"stands for {outline.flavours[flavour]}, but pretrained_model_name_or_path is {path}; keep one of them."
        )
        problems.append(Problem(place, message))
    return path or outline.flavours.get(flavour, "")


def build_sections(base: Base, data: Data, where: str, cwd: Path, problems: list[Problem]) -> Sections | None:
    """All sections; ``None`` when there are problems."""
    values = base.values
    train = _train(base, data, where, cwd, problems)
    evaluate = _evaluate(base, data, where, cwd, problems)
    push = _push(base, train, where, problems)
    if problems:
        return None
    return Sections(
        download=DownloadSection.model_validate(
            {
                "datasets": tuple(entry.source for entry in data.pictures),
                "masks": tuple(entry.masks for entry in data.masks),
                **values.pick("max_skipped_share"),
                "on_demand": tuple(one.source.id for one in data.pictures if one.geometry.vae_cache != "ahead"),
            }
        ),
        cache_vae=CacheVaeSection.model_validate(
            {
                "model": base.model,
                "datasets": tuple(entry.geometry for entry in data.pictures),
                **values.pick("vae_batch_size", "vae_cache_moments", "seed"),
                **({"vae_batch_size": data.vae_batch_size} if data.vae_batch_size else {}),
                **({"dtype": values.text("vae_dtype")} if "vae_dtype" in values else {}),
            }
        ),
        cache_text_embeds=CacheTextSection.model_validate(
            {
                "model": base.model,
                "max_length": values.integer("tokenizer_max_length", 0),
                "instruction": base.instruction,
                "captions": tuple(
                    entry.captions for entry in data.pictures if entry.captions.filters or entry.captions.shuffle
                ),
                "rounding": base.rounding,
                **values.pick("text_encoder_batch_size"),
            }
        ),
        train=train,
        evaluate=evaluate,
        push=push,
    )


def _train(base: Base, data: Data, where: str, cwd: Path, problems: list[Problem]) -> TrainSection:
    values = base.values
    steps = values.integer("max_train_steps", 0)
    epochs = values.integer("num_train_epochs", 0 if "max_train_steps" in values else 1)
    if steps and epochs:
        message = f"is {steps} and num_train_epochs is {epochs}; set one of them to 0 or remove it."
        problems.append(Problem(f"{where}.max_train_steps", message))
    if not steps and not epochs:
        problems.append(
            Problem(f"{where}.max_train_steps", "is 0 and so is num_train_epochs; set one of them above 0.")
        )
    train = TrainSection.model_validate(
        {
            "model": base.scheduled_model,
            "model_type": base.model_type,
            "lora": read_adapter(values, where, cwd, problems) if base.model_type == "lora" else None,
            "datasets": tuple(entry.sampling for entry in data.of("image")),
            "max_train_steps": steps,
            "num_train_epochs": epochs,
            "flow": base.flow,
            "fsdp": read_fsdp(values, where, problems),
            "compilation": read_compilation(values, where, problems),
            **values.pick(*_TRAIN_KEYS),
            **_optimizer(base, where, problems),
            **base.objective.train_fields(),
        }
    )
    _check_schedule(train, values, where, problems)
    _check_machinery(train, where, problems)
    check_fsdp(train, where, problems)
    _check_stages(train, data, problems)
    for entry in data.of("image"):
        flow = base.flow if base.outline.flow else None
        if fault := offset_fault(entry.sampling.timestep_sampling_offset, base.family, flow):
            problems.append(Problem(f"{entry.where}.timestep_sampling_offset", fault))
    if train.masked_loss_probability < 1 and not data.masks:
        message = "has no effect without masks: give a dataset conditioning_data, or remove it."
        problems.append(Problem(f"{where}.masked_loss_probability", message))
    return train


def _optimizer(base: Base, where: str, problems: list[Problem]) -> dict[str, object]:
    """The optimizer and its settings: the user's, or else its own defaults."""
    values = base.values
    name: OptimizerName = next((name for name in OPTIMIZERS if name == values.text("optimizer")), "torch-adamw")
    outline = OPTIMIZERS[name]
    options = read_options(name, values.text("optimizer_config"), f"{where}.optimizer_config", problems)
    plain = plain_settings(options)
    for key in ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"):
        if key in values and key not in outline.defaults:
            problems.append(Problem(f"{where}.{key}", f"has no effect with optimizer {name}; remove it."))
        elif key in values and key in plain:
            problems.append(Problem(f"{where}.{key}", "is in optimizer_config too; keep one of them."))
        if key in ("adam_beta1", "adam_beta2") and not 0 <= plain.get(key, values.number(key, 0.0)) < 1:
            place = "optimizer_config" if key in plain else key
            problems.append(Problem(f"{where}.{place}", f"sets {key} to 1 or more; expected a number below 1."))
    clip = (0.01 if base.family == "pixart_sigma" else 2.0) if outline.clips else 0.0
    return {
        "optimizer": name,
        "optimizer_options": {option: value for option, value in options.items() if option in outline.options},
        "max_grad_norm": values.number("max_grad_norm", clip),
        **outline.defaults,
        **values.pick(*outline.defaults),
        **plain,
        "learning_rate": read_rate(values, outline.learning_rate, where, problems),
    }


def _check_schedule(train: TrainSection, values: Values, where: str, problems: list[Problem]) -> None:
    floored = train.lr_scheduler in ("polynomial", "sine")
    if floored and train.learning_rate <= train.lr_end:
        message = f"is {train.lr_end:g}, not below learning_rate {train.learning_rate:g}; the rate could not fall."
        problems.append(Problem(f"{where}.lr_end", message))
    idle = [] if floored else ["lr_end"]
    idle += [] if train.lr_scheduler == "polynomial" else ["lr_power"]
    if train.lr_scheduler not in ("cosine_with_restarts", "sine") and train.lr_num_cycles > 1:
        idle.append("lr_num_cycles")
    message = f"has no effect with lr_scheduler {train.lr_scheduler}; remove it."
    problems.extend(Problem(f"{where}.{name}", message) for name in idle if name in values)
    if train.max_train_steps and train.lr_warmup_steps > train.max_train_steps:
        message = f"is {train.lr_warmup_steps}, above max_train_steps {train.max_train_steps}."
        problems.append(Problem(f"{where}.lr_warmup_steps", message))


def _check_machinery(train: TrainSection, where: str, problems: list[Problem]) -> None:
    """How the network is run: what has no effect, and what the kernels of attention ask for."""
    if train.gradient_checkpointing_interval > 1 and not train.gradient_checkpointing:
        message = f"is {train.gradient_checkpointing_interval} and gradient_checkpointing is false; remove one of them."
        problems.append(Problem(f"{where}.gradient_checkpointing_interval", message))
    mechanism, place = train.attention_mechanism, f"{where}.attention_mechanism"
    if train.model.family == "sana" and mechanism in WITHOUT_MASKS:
        message = "has no effect for sana, whose self-attention is linear and whose other attention has a mask"
        problems.append(Problem(place, f"is {mechanism!r}, which {message}; use 'diffusers'."))
    elif mechanism in HALF_ONLY and train.mixed_precision == "no":
        problems.append(Problem(place, f"is {mechanism!r}, which needs mixed_precision 'bf16'."))
    rounded = train.base_model_precision
    if rounded != "no_change" and (reason := unroundable(train, rounded)):
        message = f"is {rounded!r}, {reason}; use 'no_change'."
        problems.append(Problem(f"{where}.base_model_precision", message))


def _check_stages(train: TrainSection, data: Data, problems: list[Problem]) -> None:
    """``start_step`` and ``end_step`` against the length of the run."""
    scheduled = [
        (f"{entry.where}.{name}", entry.sampling)
        for entry in data.of("image")
        for name, used in (("start_step", entry.sampling.start_step > 1), ("end_step", entry.sampling.end_step))
        if used
    ]
    if not scheduled:
        return
    by_epoch = [entry for entry in data.of("image") if entry.epochs is not None]
    if by_epoch:
        message = "is in epochs and other entries' schedules are in steps; write all of them in one unit."
        problems.extend(Problem(f"{entry.where}.start_epoch", message) for entry in by_epoch)
        return
    if not train.max_train_steps:
        message = "needs max_train_steps: an epoch's length changes when a dataset comes or goes."
        problems.extend(Problem(place, message) for place, _ in scheduled)
        return
    for stage in empty_stages(train.datasets, train.max_train_steps):
        message = f"leaves {stage} of {train.max_train_steps} without any dataset; let one of them go on or begin then."
        problems.append(Problem(scheduled[0][0], message))


def _evaluate(base: Base, data: Data, where: str, cwd: Path, problems: list[Problem]) -> EvaluateSection:
    values = base.values
    held_out = tuple(entry.source.id for entry in data.of("eval"))
    chosen = values.text("eval_dataset_id")
    if chosen and chosen not in held_out:
        known = ", ".join(held_out) or "none"
        message = f"is {chosen!r}; expected the id of an entry with dataset_type eval (there are: {known})."
        problems.append(Problem(f"{where}.eval_dataset_id", message))
    clip = values.text("evaluation_type") == "clip"
    if not clip and "pretrained_evaluation_model_name_or_path" in values:
        message = "would not be used; set evaluation_type to clip."
        problems.append(Problem(f"{where}.pretrained_evaluation_model_name_or_path", message))
    prompts = read_prompts(values, where, cwd, problems)
    if clip and not prompts:
        message = "is clip, which scores validation pictures; set validation_prompt or user_prompt_library."
        problems.append(Problem(f"{where}.evaluation_type", message))
    resolutions = read_resolutions(values, where, base.outline, problems)
    names = {
        "guidance": "validation_guidance",
        "num_inference_steps": "validation_num_inference_steps",
        "negative_prompt": "validation_negative_prompt",
    }
    seed = {"seed": values.integer("validation_seed", values.integer("seed", DEFAULT_SEED))}
    return EvaluateSection.model_validate(
        {
            "model": base.scheduled_model,
            "model_type": base.model_type,
            "eval_datasets": () if values.flag("eval_loss_disable") else (chosen,) if chosen else held_out,
            "prompts": prompts,
            **({"resolutions": resolutions} if resolutions else {}),
            "judge": values.text("pretrained_evaluation_model_name_or_path", DEFAULT_JUDGE) if clip else "",
            "instruction": base.instruction,
            "max_length": values.integer("tokenizer_max_length", 0),
            "flow": base.flow,
            "rounding": base.rounding,
            **seed,
            **{field: values.get(key) for field, key in names.items() if key in values},
            **values.pick(
                "num_eval_images", "eval_timesteps", "num_validation_images", "evaluation_type", "mixed_precision"
            ),
        }
    )


def _push(base: Base, train: TrainSection, where: str, problems: list[Problem]) -> PushSection:
    values = base.values
    name = values.text("hub_model_id").removeprefix("https://huggingface.co/").strip("/")
    if name and not _HUB_ID.fullmatch(name):
        problems.append(Problem(f"{where}.hub_model_id", f"is {name!r}; expected namespace/name."))
    if values.flag("push_to_hub") and not name:
        problems.append(Problem(f"{where}.hub_model_id", "is missing; push_to_hub needs namespace/name."))
    return PushSection(
        model=base.scheduled_model,
        model_type=base.model_type,
        push_to_hub=values.flag("push_to_hub"),
        hub_model_id=name,
        private=values.flag("model_card_private", True),
        safe_for_work=values.flag("model_card_safe_for_work"),
        note=values.text("model_card_note"),
        training=train.to_json(),
    )
