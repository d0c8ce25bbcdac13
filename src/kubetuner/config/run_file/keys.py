"""The keys of ``config.json`` that are used; see :mod:`kubetuner.config.run_file.later` for the others SimpleTuner has.

Defaults are the sections' own. Where they differ from SimpleTuner's:

* ``optimizer`` is ``torch-adamw``: SimpleTuner's ``adamw_bf16`` trains weights held in bfloat16 and makes up for it
  with stochastic rounding, so it cannot be compared with a float32 run; plain AdamW on float32 weights can.
* ``grad_clip_method`` is ``norm``: clipping by value bends the gradient's direction.
* ``max_grad_norm`` is 0.01 for PixArt only while it is not set; a set value is used as it stands.
* ``lora_dropout`` is 0 for ``olora`` and ``pissa`` while it is not set: it would drop a part of the base's own weights.
* ``num_train_epochs`` is 1 only while ``max_train_steps`` is not set.
* ``vae_cache_moments`` is ours. SimpleTuner stores one sample of the VAE's distribution and shows it in every epoch;
  with the moments each epoch draws another. It is off because it doubles the bytes of latents.
* ``seed`` is 42, so that two runs agree; ``validation_resolution`` is 1024x1024; the negative prompt is empty.
"""

from kubetuner.config import attention, precision
from kubetuner.config.compilation import COMPILATION_RULES
from kubetuner.config.keys import Alias, Key, Rule, Schema, Unneeded, one_of
from kubetuner.config.optimizers import OPTIMIZERS
from kubetuner.config.run_file.adapters import LOFTQ
from kubetuner.config.run_file.distribution import DISTRIBUTION_RULES
from kubetuner.config.run_file.later import FOREIGN, LATER, LATER_OPTIMIZERS
from kubetuner.config.run_file.objective import OBJECTIVE_RULES
from kubetuner.config.text_rounding import MOST_ENCODERS, text_precision_key

_PRECISION = Key("str", one_of(*precision.PRECISIONS), later=precision.LATER, refused=precision.REFUSED)

MODEL_RULES: dict[str, Rule] = {
    "model_type": Key("str", one_of("full", "lora"), nullable=False),
    "model_family": Key("str", one_of("pixart_sigma", "sdxl", "sana"), nullable=False),
    "model_flavour": Key("str"),
    "pretrained_model_name_or_path": Key("str"),
    "pretrained_vae_model_name_or_path": Key("str"),
    "revision": Key("str"),
    "variant": Key("str"),
    "lora_type": Key("str", one_of("standard", "lycoris")),
    "lora_rank": Key("int", low=1),
    "lora_alpha": Key("float", above=0),
    "lora_dropout": Key("float", low=0, high=1),
    "lora_init_type": Key("str", one_of("default", "gaussian", "olora", "pissa"), refused={"loftq": LOFTQ}),
    "peft_lora_target_modules": Key("texts"),
    "use_dora": Key("bool"),
    "init_lora": Key("str"),
    "lycoris_config": Key("json"),
    "layer_freeze_strategy": Key("str", one_of("none", "bitfit")),
    "gradient_checkpointing": Key("bool"),
    "gradient_checkpointing_interval": Key("int", low=1),
    "base_model_precision": _PRECISION,
    **{text_precision_key(number): _PRECISION for number in range(1, MOST_ENCODERS + 1)},
    "quantize_via": Key("str", one_of("accelerator", "cpu"), later=frozenset({"pipeline"})),
    "attention_mechanism": Key(
        "str", one_of(*attention.MECHANISMS), later=frozenset({"flex"}), refused=attention.REFUSED
    ),
    "sana_complex_human_instruction": Key("texts"),
    "tokenizer_max_length": Key("int", low=1),
    "vae_dtype": Key("str", {"bf16": "bf16", "fp32": "fp32"}, later=frozenset({"fp16"})),
    "vae_batch_size": Key("int", low=1),
    "vae_cache_moments": Key("bool"),
    "vae_cache_disable": Key("bool"),
    "vae_cache_ondemand": Key("bool"),
    "text_encoder_batch_size": Key("int", low=1),
}

TRAIN_RULES: dict[str, Rule] = {
    "max_train_steps": Key("int", low=0),
    "num_train_epochs": Key("int", low=0),
    "train_batch_size": Key("int", low=1),
    "gradient_accumulation_steps": Key("int", low=1),
    "mixed_precision": Key("str", one_of("no", "bf16"), later=frozenset({"fp16", "fp8"})),
    "optimizer": Key(
        "str",
        {**one_of(*OPTIMIZERS), "adamw": "torch-adamw", "adafactor": "torch-adafactor"},
        later=LATER_OPTIMIZERS,
    ),
    "optimizer_config": Key("str"),
    "adam_beta1": Key("float", low=0, high=1),
    "adam_beta2": Key("float", low=0, high=1),
    "adam_weight_decay": Key("float", low=0),
    "adam_epsilon": Key("float", above=0),
    "learning_rate": Key("float", above=0),
    "lr_scale": Key("bool"),
    "lr_scale_sqrt": Key("bool"),
    "lr_scheduler": Key(
        "str",
        one_of("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "sine", "polynomial"),
    ),
    "lr_warmup_steps": Key("int", low=0),
    "lr_end": Key("float", low=0),
    "lr_power": Key("float", above=0),
    "lr_num_cycles": Key("int", low=1),
    "max_grad_norm": Key("float", low=0),
    "grad_clip_method": Key("str", one_of("norm", "value")),
    "caption_dropout_probability": Key("float", low=0, high=1),
    "disable_segmented_timestep_sampling": Key("bool"),
    "seed": Key("int", low=0),
    "checkpoint_step_interval": Key("int", low=0),
    "checkpoint_epoch_interval": Key("int", low=0),
    "checkpoints_total_limit": Key("int", low=1),
    "resume_from_checkpoint": Key("str"),
    "log_step_interval": Key("int", low=1),
    "data_backend_sampling": Key("str", one_of("auto-weighting", "uniform")),
    "masked_loss_probability": Key("float", low=0, high=1),
    "conditioning_multidataset_sampling": Key(
        "str",
        one_of("random"),
        refused={"combined": "it shows several control pictures to the model at once, and a loss has one mask."},
    ),
}

EVALUATE_RULES: dict[str, Rule] = {
    "validation_resolution": Key("pick"),
    "validation_guidance": Key("float", low=0),
    "validation_num_inference_steps": Key("int", low=1),
    "validation_prompt": Key("str"),
    "validation_negative_prompt": Key("str"),
    "validation_seed": Key("int", low=0),
    "user_prompt_library": Key("prompts"),
    "num_validation_images": Key("int", low=1),
    "evaluation_type": Key("str", one_of("none", "clip")),
    "pretrained_evaluation_model_name_or_path": Key("str"),
    "num_eval_images": Key("int", low=1),
    "eval_timesteps": Key("int", low=1),
    "eval_dataset_id": Key("str"),
    "eval_loss_disable": Key("bool"),
}

PUBLISH_RULES: dict[str, Rule] = {
    "output_dir": Key("str"),
    "push_to_hub": Key("bool"),
    "hub_model_id": Key("str"),
    "model_card_private": Key("bool"),
    "model_card_safe_for_work": Key("bool"),
    "model_card_note": Key("str"),
    "report_to": Key(
        "str",
        one_of("none", "mlflow"),
        refused=dict.fromkeys(
            ("wandb", "tensorboard", "swanlab", "comet_ml", "custom-tracker", "all", "simpletuner"),
            "runs are tracked with MLflow, at MLFLOW_TRACKING_URI.",
        ),
    ),
    "tracker_project_name": Key("str"),
    "tracker_run_name": Key("str"),
}

DATA_RULES: dict[str, Rule] = {
    "data_backend_config": Key("str"),
    "resolution": Key("float", above=0),
    "resolution_type": Key("str", one_of("pixel", "area", "pixel_area")),
    "caption_strategy": Key("str", one_of("filename", "textfile", "instanceprompt")),
    "instance_prompt": Key("texts"),
    "minimum_image_size": Key("float", low=0),
    "maximum_image_size": Key("float", above=0),
    "target_downsample_size": Key("float", above=0),
    "max_upscale_threshold": Key("float", low=0),
    "vae_cache_clear_each_epoch": Key("bool"),
    "aspect_bucket_rounding": Key("int", low=1, high=9),
    "aspect_bucket_alignment": Key("int", low=8, high=64),
    "max_skipped_share": Key("float", low=0, high=1),
    "allow_dataset_oversubscription": Key("bool"),
    "preserve_data_backend_cache": Unneeded("bool", "listings are not kept between runs"),
    "skip_file_discovery": Unneeded("str", "plan and download list a folder once each; caches are found by content"),
    "cache_dir": Unneeded("str", "caches are artifacts, kept by content in the store"),
    "cache_dir_vae": Unneeded("str", "caches are artifacts, kept by content in the store"),
    "cache_dir_text": Unneeded("str", "caches are artifacts, kept by content in the store"),
    "write_batch_size": Unneeded("int", "shards are written whole"),
    "read_batch_size": Unneeded("int", "pictures are read as they are needed"),
    "image_processing_batch_size": Unneeded("int", "pictures are prepared as they are needed"),
    "max_workers": Unneeded("int", "the number of workers follows the processors"),
    "metadata_update_interval": Unneeded("int", "listings are not kept between runs"),
    "logging_dir": Unneeded("str", "metrics go to MLflow"),
}


def _bitfit(value: object) -> object:
    return {True: "bitfit", False: "none"}.get(value, value) if isinstance(value, bool) else value


ALIASES: dict[str, Alias] = {
    "use_bitfit": Alias("layer_freeze_strategy", _bitfit),
    **{
        old: Alias(new)
        for old, new in {
            "use_gradient_checkpointing": "gradient_checkpointing",
            "checkpointing_steps": "checkpoint_step_interval",
            "checkpointing_limit": "checkpoints_total_limit",
            "validation_steps": "validation_step_interval",
            "model_name": "pretrained_model_name_or_path",
            "model_flavor": "model_flavour",
            "max_num_steps": "max_train_steps",
            "num_epochs": "num_train_epochs",
            "lr_schedule": "lr_scheduler",
            "training_seed": "seed",
            "dataloader_config": "data_backend_config",
            "optimizer_beta1": "adam_beta1",
            "optimizer_beta2": "adam_beta2",
            "user_prompt_library_path": "user_prompt_library",
            "num_processes": "num_train_processes",
            "lora_target_modules": "peft_lora_target_modules",
        }.items()
    },
}

RUN_SCHEMA = Schema(
    rules={
        **LATER,
        **FOREIGN,
        **MODEL_RULES,
        **TRAIN_RULES,
        **DISTRIBUTION_RULES,
        **COMPILATION_RULES,
        **OBJECTIVE_RULES,
        **EVALUATE_RULES,
        **PUBLISH_RULES,
        **DATA_RULES,
    },
    aliases=ALIASES,
)
