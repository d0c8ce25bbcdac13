"""One frozen section per step: exactly the settings that the step needs.

A section travels between pipeline steps as canonical JSON (``Section.to_json``), so equal settings are equal
bytes and Kubeflow's cache agrees with ours. Fields that change speed but not results are listed in
``SPEED_ONLY`` and stay out of fingerprints. Names are SimpleTuner's keys.
"""

from typing import ClassVar, Literal

from pydantic import Field

from kubetuner.config.compilation import CompileSettings
from kubetuner.config.optimizers import OptimizerName, Option
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.base import DEFAULT_SEED, Section
from kubetuner.config.sections.captions import DatasetCaptions
from kubetuner.config.sections.distribution import FsdpSettings
from kubetuner.config.sections.geometry import DatasetGeometry
from kubetuner.config.sections.objective import (
    EmaSettings,
    FlowSchedule,
    LossSettings,
    NoiseSettings,
    ProcessSettings,
    RolloutSettings,
    SchedulerChange,
    TimestepBias,
)
from kubetuner.config.sections.sources import DownloadSection
from kubetuner.config.text_rounding import TextRounding

FamilyName = Literal["pixart_sigma", "sdxl", "sana"]
ModelType = Literal["full", "lora"]
LrScheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "sine", "polynomial"
]


class ModelRef(Section):
    """Which pretrained pipeline.

    Attributes:
        family: ``model_family``.
        path: Hub id or folder (``pretrained_model_name_or_path``, or the one of ``model_flavour``).
        revision: Hub commit, or for a folder the hash of its contents; resolved by ``plan``.
        variant: File variant such as ``fp16``; empty for none.
        vae_path: ``pretrained_vae_model_name_or_path``; empty for the pipeline's own VAE.
        vae_revision: Hash of the files that the VAE is loaded from when they are in a folder; resolved by ``plan``.
        text_revision: As ``vae_revision``, of the tokenizers and text encoders.
        scheduler: How the denoiser's noise schedule is read; unset in the caches' sections, which ask nothing of it.
    """

    family: FamilyName
    path: str
    revision: str = ""
    variant: str = ""
    vae_path: str = ""
    vae_revision: str = ""
    text_revision: str = ""
    scheduler: SchedulerChange = SchedulerChange()

    def vae_identity(self) -> tuple[str, ...]:
        """What latents depend on: the VAE's contents wherever they lie, or a hub repository and its revision."""
        own = self.vae_path in ("", self.path)
        variant = self.variant if own else ""
        if self.vae_revision:
            return self.family, self.vae_revision, variant
        return (self.family, self.path, self.revision, variant) if own else (self.family, self.vae_path)

    def text_identity(self) -> tuple[str, ...]:
        """As :meth:`vae_identity`, for text embeddings."""
        place = (self.text_revision,) if self.text_revision else (self.path, self.revision)
        return self.family, *place, self.variant


class CacheVaeSection(Section):
    """Settings of ``cache_vae``.

    Attributes:
        seed: Seeds random crops and the posterior's sample, together with the picture's content.
        dtype: Stored dtype of latents.
        vae_batch_size: Pictures encoded at once; changes latents by rounding alone, no reason to encode anew.
        vae_cache_moments: Keep mean and standard deviation of each picture's latents, so that training draws another
            sample at every use, instead of one sample; twice the bytes.
    """

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset({"vae_batch_size"})

    model: ModelRef
    datasets: tuple[DatasetGeometry, ...]
    seed: int = DEFAULT_SEED
    dtype: Literal["bf16", "fp32"] = "fp32"
    vae_batch_size: int = 4
    vae_cache_moments: bool = False

    def deciding(self) -> dict[str, object]:
        """Of the model, the VAE alone."""
        return super().deciding() | {"model": self.model.vae_identity()}


class CacheTextSection(Section):
    """Settings of ``cache_text_embeds``.

    Attributes:
        max_length: Tokens per text (``tokenizer_max_length``); the family's own when 0.
        instruction: Sana's complex human instruction, empty for none; ignored by other families.
        clean_caption: PixArt's caption cleaning.
        dtype: Stored dtype of embeddings.
        captions: What is done to captions first, of the datasets whose captions are changed.
        text_encoder_batch_size: Texts encoded at once.
        rounding: How the text encoders are stored.
    """

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset({"text_encoder_batch_size"})

    model: ModelRef
    max_length: int = 0
    instruction: str = ""
    clean_caption: bool = True
    dtype: Literal["bf16", "fp32"] = "fp32"
    captions: tuple[DatasetCaptions, ...] = ()
    text_encoder_batch_size: int = 16
    rounding: TextRounding = TextRounding()

    def encoding(self) -> dict[str, object]:
        """The settings that decide a text's embedding: without ``captions``, which decide what the texts are."""
        return {name: value for name, value in self.deciding().items() if name != "captions"}

    def deciding(self) -> dict[str, object]:
        """Of the model, tokenizers and text encoders alone; their precisions where some are not as published."""
        settings = super().deciding() | {"model": self.model.text_identity()}
        del settings["rounding"]  # So embeddings that were cached before there was such a setting keep their keys.
        return settings | ({"precisions": self.rounding.precisions} if self.rounding.precisions else {})


class DatasetSampling(Section):
    """How often and when a dataset is drawn from.

    Attributes:
        repeats: Extra passes per epoch; 0 is one pass.
        probability: Weight against the other datasets (``data_backend_sampling``).
        start_step: First optimizer step that draws from it, from 1; 0 is the same as 1.
        end_step: Last optimizer step that draws from it; ``None`` for no end.
        train_batch_size: Samples of each of its batches; ``None`` for as many as the section says.
        timestep_sampling_offset: Added to the normal values that a flow's noise levels are made of; above 0 is more
            noise.
        is_regularisation_data: A LoRA's target is the base model's own prediction instead of the noise.
    """

    id: str
    repeats: int = 0
    probability: float = 1.0
    start_step: int = 0
    end_step: int | None = None
    train_batch_size: int | None = None
    timestep_sampling_offset: float = 0.0
    is_regularisation_data: bool = False


class TrainSection(Section):
    """Settings of ``train``.

    Attributes:
        layer_freeze_strategy: ``bitfit`` trains the biases only (``model_type: full``).
        train_batch_size: Samples of a batch of datasets that do not say; see :meth:`batch_size`.
        gradient_checkpointing_interval: Every n-th block's activations are computed again instead of being kept.
        attention_mechanism: Kernel of softmax attention; see :mod:`kubetuner.config.attention`.
        compilation: ``None`` without ``dynamo_backend``.
        base_model_precision: How the frozen base's linear layers are stored; see :mod:`kubetuner.config.precision`.
        quantize_via: Where they are rounded; on the CPU, a GPU never holds the whole base.
        max_train_steps: Optimizer steps; exactly one of this and ``num_train_epochs`` is above 0.
        grad_clip_method: ``norm`` or ``value``; ``max_grad_norm`` 0 turns clipping off.
        checkpoint_step_interval: Optimizer steps between checkpoints; 0 for none by steps. There is one at the end.
        checkpoint_epoch_interval: Epochs between further checkpoints; 0 for none by epochs.
        lr_end: Floor of the ``polynomial`` and ``sine`` schedules.
        lr_num_cycles: Restarts or waves over the whole run.
        optimizer_options: ``optimizer_config``, checked and typed.
        rollout: ``None`` without ``scheduled_sampling_max_step_offset``.
        ema: ``None`` without ``use_ema``.
        masked_loss_probability: How likely a sample's mask is used, 0..1, where it has one.
        nonfinite_loss: What to do with a step whose loss or gradient is not finite.
        log_step_interval: Optimizer steps between logged points.
        seed: Seeds noise, timesteps, caption dropout, sampling order and adapter initialisation.
        num_train_processes: Processes of a pod, each with batches of its own; 0 for one per GPU, or one on a CPU.
        num_machines: Pods of so many processes each that train together; see :mod:`kubetuner.config.trainjob`.
        fsdp: How they share out the weights; ``None`` without ``fsdp_enable``.
    """

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset(
        {
            "checkpoint_step_interval", "checkpoint_epoch_interval", "checkpoints_total_limit",
            "resume_from_checkpoint", "num_train_processes", "num_machines", "fsdp", "quantize_via",
        }
    )  # fmt: skip

    model: ModelRef
    model_type: ModelType
    lora: LoraSettings | None = None
    layer_freeze_strategy: Literal["none", "bitfit"] = "none"
    datasets: tuple[DatasetSampling, ...]
    data_backend_sampling: Literal["auto-weighting", "uniform"] = "auto-weighting"
    max_train_steps: int = 0
    num_train_epochs: int = 0
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    gradient_checkpointing_interval: int = 1
    attention_mechanism: str = "diffusers"
    compilation: CompileSettings | None = None
    base_model_precision: str = "no_change"
    quantize_via: Literal["accelerator", "cpu"] = "accelerator"
    mixed_precision: Literal["no", "bf16"] = "bf16"
    optimizer: OptimizerName = "torch-adamw"
    optimizer_options: dict[str, Option] = Field(default_factory=dict)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    learning_rate: float = 4e-7
    lr_scheduler: LrScheduler = "constant_with_warmup"
    lr_warmup_steps: int = 0
    lr_end: float = 0.0
    lr_power: float = 1.0
    lr_num_cycles: int = 1
    max_grad_norm: float = 2.0
    grad_clip_method: Literal["norm", "value"] = "norm"
    caption_dropout_probability: float = 0.1
    disable_segmented_timestep_sampling: bool = False
    flow: FlowSchedule = FlowSchedule()
    timestep_bias: TimestepBias = TimestepBias()
    loss: LossSettings = LossSettings()
    noise: NoiseSettings = NoiseSettings()
    rollout: RolloutSettings | None = None
    ema: EmaSettings | None = None
    masked_loss_probability: float = 1.0
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    seed: int = DEFAULT_SEED
    checkpoint_step_interval: int = 500
    checkpoint_epoch_interval: int = 0
    checkpoints_total_limit: int = 5
    resume_from_checkpoint: str = "latest"
    log_step_interval: int = 1
    num_train_processes: int = 0
    num_machines: int = 1
    fsdp: FsdpSettings | None = None

    def batch_size(self, dataset: DatasetSampling) -> int:
        """Samples of each batch of one of the datasets."""
        return dataset.train_batch_size or self.train_batch_size

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The different sizes of batches, ascending."""
        return tuple(sorted({self.batch_size(dataset) for dataset in self.datasets}))

    @property
    def planned_micro_steps(self) -> int:
        """Batches per optimizer step."""
        return self.gradient_accumulation_steps * self.planned_processes

    @property
    def planned_processes(self) -> int:
        """Processes on all machines; counted as one per machine where its GPUs decide how many there are."""
        return max(self.num_train_processes, 1) * self.num_machines

    def deciding_with(self, processes: int) -> dict[str, object]:
        """As :meth:`deciding`: of so many processes, the batches per optimizer step are what decides."""
        return self.deciding() | {"gradient_accumulation_steps": self.gradient_accumulation_steps * processes}

    @property
    def frozen_in_bf16(self) -> bool:
        """Whether the frozen base is held in bfloat16; see ``kubetuner.training.denoiser``."""
        if self.lora is None or self.lora.init_type in ("olora", "pissa"):
            return False
        return self.mixed_precision == "bf16"

    def process(self, dataset: DatasetSampling | None = None) -> ProcessSettings:
        """What the family's noise process is made with, for all datasets or for one that has settings of its own."""
        return ProcessSettings(
            offset=0.0 if dataset is None else dataset.timestep_sampling_offset,
            segmented=not self.disable_segmented_timestep_sampling,
            flow=self.flow,
            bias=self.timestep_bias,
            loss=self.loss,
        )


class Prompt(Section):
    """A validation prompt; ``shortname`` names its pictures."""

    shortname: str
    prompt: str


class EvaluateSection(Section):
    """Settings of ``evaluate``.

    Attributes:
        eval_datasets: Ids of the held-out datasets (``dataset_type: eval``).
        num_eval_images: Samples used per held-out dataset.
        eval_timesteps: Noise levels per sample.
        prompts: Validation prompts with short names.
        negative_prompt: ``validation_negative_prompt``.
        resolutions: (width, height) in pixels.
        guidance: ``validation_guidance``.
        num_inference_steps: ``validation_num_inference_steps``.
        num_validation_images: Pictures per prompt and resolution, with consecutive seeds.
        seed: Seed of the first picture of every prompt.
        evaluation_type: ``clip`` scores pictures with ``judge``.
        judge: CLIP model: hub id or folder (``pretrained_evaluation_model_name_or_path``).
        judge_revision: Hash of the contents of ``judge`` when that is a folder; resolved by ``plan``.
        instruction: See :class:`CacheTextSection`.
        clean_caption: See :class:`CacheTextSection`.
        rounding: See :class:`CacheTextSection`; pictures are drawn with the encoders that captions were cached with.
    """

    model: ModelRef
    model_type: ModelType
    eval_datasets: tuple[str, ...] = ()
    num_eval_images: int = 4
    eval_timesteps: int = 28
    prompts: tuple[Prompt, ...] = ()
    negative_prompt: str = ""
    resolutions: tuple[tuple[int, int], ...] = ((1024, 1024),)
    guidance: float = 7.5
    num_inference_steps: int = 30
    num_validation_images: int = 1
    seed: int = DEFAULT_SEED
    evaluation_type: Literal["none", "clip"] = "none"
    judge: str = ""
    judge_revision: str = ""
    instruction: str = ""
    clean_caption: bool = True
    max_length: int = 0
    mixed_precision: Literal["no", "bf16"] = "bf16"
    flow: FlowSchedule = FlowSchedule()
    rounding: TextRounding = TextRounding()


class PushSection(Section):
    """Settings of ``push_to_hub``.

    Attributes:
        push_to_hub: Without it the folder is written to ``hub/`` and not uploaded.
        hub_model_id: ``namespace/name``, or ``name`` for the token's user.
        private: ``model_card_private``.
        safe_for_work: ``model_card_safe_for_work``.
        note: ``model_card_note``, shown in the card.
        training: Facts for the card: settings of the train section as JSON.
    """

    model: ModelRef
    model_type: ModelType
    push_to_hub: bool = False
    hub_model_id: str = ""
    private: bool = True
    safe_for_work: bool = False
    note: str = ""
    training: str = "{}"


class Sections(Section):
    """All sections of a run."""

    download: DownloadSection
    cache_vae: CacheVaeSection
    cache_text_embeds: CacheTextSection
    train: TrainSection
    evaluate: EvaluateSection
    push: PushSection
