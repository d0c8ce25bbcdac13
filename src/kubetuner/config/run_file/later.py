"""Keys of ``config.json`` that SimpleTuner has and that do nothing here: not available yet, or without meaning."""

from kubetuner.config.data_file import reasons
from kubetuner.config.keys import Foreign, Later, Rule, Unneeded

LATER_OPTIMIZERS = frozenset(
    {
        "adamw_bf16", "adamw_schedulefree", "adamw_schedulefree+aggressive", "adamw_schedulefree+no_kahan",
        "torch-adam", "torch-sgd", "torch-radam", "torch-nadam", "torch-rmsprop", "torch-adagrad", "torch-adadelta",
        "torch-adamax", "torch-asgd", "torch-sparseadam", "ao-adamfp8",
        "optimi-radam", "optimi-ranger", "optimi-adan", "optimi-adam", "optimi-sgd",
        *(
            f"bnb-{name}{suffix}"
            for name in ("adagrad", "adam", "ademamix")
            for suffix in ("", "8bit", "-paged", "8bit-paged")
        ),
        "soap", "muon",
    }
)  # fmt: skip

_QUANTISED = "quantised weights are"
_PREVIEW = "pictures are drawn in a step of their own, after training, and its report shows them when they are finished"

LATER: dict[str, Rule] = {
    "base_model_default_dtype": Later("another dtype of the frozen weights is", ("bf16",)),
    "quantize_activations": Later(_QUANTISED, (False,)),
    "quantization_config": Later(_QUANTISED),
    "validation_lycoris_strength": Later("LyCORIS is", (1.0,)),
    "lora_format": Later("another format of the LoRA file is", ("diffusers",)),
    "peft_lora_mode": Later("another LoRA variant is", ("standard",)),
    "refiner_training": Later("refiner training is", (False,)),
    "refiner_training_strength": Later("refiner training is", (0.2,)),
    "refiner_training_invert_schedule": Later("refiner training is", (False,)),
    "data_aesthetic_score": Later("refiner training is", (7.0,)),
    "train_text_encoder": Later("training of text encoders is", (False,)),
    "t5_padding": Later("zeroed T5 padding is", ("unmodified",)),
    "flow_cubic_schedule_weights": Later("a density through given weights is"),
    "enable_xformers_memory_efficient_attention": Later("this spelling of attention_mechanism 'xformers' is", (False,)),
    "text_cache_disable": Foreign(reasons.TEXT_CACHE, (False,)),
    "text_cache_ondemand": Foreign(reasons.TEXT_CACHE, (False,)),
    "compress_disk_cache": Unneeded("bool", reasons.COMPRESSED),
    "vae_enable_tiling": Later("tiling of the VAE is", (False,)),
    "vae_enable_slicing": Later("slicing of the VAE is", (False,)),
    "validation_preview": Unneeded("bool", _PREVIEW),
    "validation_preview_steps": Unneeded("int", _PREVIEW),
    "validation_step_interval": Later("drawing pictures during training (they are drawn once, after it) is", (0,)),
    "validation_epoch_interval": Later("drawing pictures during training (they are drawn once, after it) is", (0,)),
    "validation_on_startup": Later("drawing pictures before training is", (False,)),
    "validation_disable": Later("leaving out the validation pictures is", (False,)),
    "validation_disable_unconditional": Later("drawing a picture without a prompt is", (True,)),
    "validation_prompt_library": Later("a built-in prompt library is", (False,)),
    "validation_guidance_rescale": Later("rescaled guidance is", (0,)),
    "validation_seed_source": Later("another source of validation seeds is", ("cpu",)),
    "validation_randomize": Later("random validation seeds are", (False,)),
    "validation_noise_scheduler": Later("another sampler for validation is", ("",)),
    "validation_multigpu": Later("validation on several GPUs is", ("single-gpu",)),
    "validation_method": Later("an external validation script is", ("simpletuner-local",)),
    "eval_steps_interval": Later("evaluation during training (it is done once, after it) is", (0,)),
    "eval_epoch_interval": Later("evaluation during training (it is done once, after it) is", (0,)),
    "eval_dataset_pooling": Later("pooling of evaluation datasets is", (False,)),
    "optimizer_release_gradients": Later("releasing gradients early is", (False,)),
    "fuse_optimizer": Later("a fused optimizer is", (False,)),
    "gradient_precision": Later("another gradient precision is", ("unmodified",)),
    "optimizer_cpu_offload_method": Later("an optimizer on the CPU is", ("none",)),
    "checkpointing_rolling_steps": Later("rolling checkpoints are", (0,)),
    "checkpoints_rolling_total_limit": Later("rolling checkpoints are", (1,)),
    "strict_epoch_limit": Later("stopping on epochs in step mode is", (False,)),
    "allow_dataset_oversubscription": Later("raising repeats automatically is", (False,)),
    "disable_bucket_pruning": Later("keeping buckets smaller than a batch is", (False,)),
    "push_checkpoints_to_hub": Later("uploading checkpoints is", (False,)),
    "push_to_hub_background": Later("uploading in the background is", (False,)),
    "publishing_config": Later("publishing anywhere but on the hub is"),
    "webhook_config": Later("webhooks are"),
    "musubi_blocks_to_swap": Later("swapping of blocks is", (0,)),
    "enable_group_offload": Later("offloading is", (False,)),
    "controlnet": Later("ControlNet training is", (False,)),
    "scan_for_errors": Unneeded("bool", reasons.SCANNED),
    "delete_unwanted_images": Foreign(reasons.DELETING, (False,)),
    "delete_problematic_images": Foreign(reasons.DELETING, (False,)),
    "override_dataset_config": Unneeded("bool", reasons.NOT_STORED),
    "disable_benchmark": Later("drawing the base model's pictures is", (True,)),
    "i_know_what_i_am_doing": Later("switching off checks is", (False,)),
    "set_grads_to_none": Later("keeping gradient buffers is", (True, False)),
    "disable_tf32": Later("full-precision matrix products are", (False,)),
}

_CLUSTER = "The pipeline decides where steps run, not the training program."
_TRACKER = "Metrics go to MLflow, whose address comes from the environment."

FOREIGN: dict[str, Rule] = {
    "accelerate_config": Foreign(_CLUSTER),
    "accelerate_extra_args": Foreign(_CLUSTER),
    "deepspeed_config": Foreign(_CLUSTER),
    "main_process_port": Foreign(_CLUSTER),
    "trainer_extra_args": Foreign("Extra arguments are keys of their own in config.json."),
    "custom_tracker": Foreign(_TRACKER),
    "tracker_image_layout": Foreign(_TRACKER),
    "hub_token": Foreign("Tokens do not belong into a configuration; set HF_TOKEN in the environment."),
    "disable_vae_cache": Foreign("SimpleTuner has no such key; its name is vae_cache_disable."),
    "post_upload_script": Foreign("Steps run no user scripts."),
    "post_checkpoint_script": Foreign("Steps run no user scripts."),
    "delete_invalid_checkpoints": Foreign("A checkpoint is complete or absent, so there is nothing to delete."),
    "checkpointing_use_tempdir": Foreign("Checkpoints are always written beside and renamed."),
    "delete_model_after_load": Foreign("Steps never delete a model."),
    "disk_low_threshold": Foreign("Kubernetes watches the disk."),
    "pixart_validation_pipeline_mode": Foreign("There is one stage."),
    "sdxl_validation_pipeline_mode": Foreign("There is one stage."),
    "weighting_scheme": Foreign("SimpleTuner does not take this key."),
    "merge_environment_config": Foreign("Values from the environment are written as {env:VAR}."),
}
