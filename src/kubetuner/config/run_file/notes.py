"""What each key of ``config.json`` means, its default, and where SimpleTuner differs; ``docs/config.md`` is made of it.

Keys are those of :data:`kubetuner.config.run_file.keys.RUN_SCHEMA` that are used. What a default does is decided where
the key is read; a test holds that setting a key to the default given here changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Plain = str | int | float | bool


@dataclass(frozen=True)
class Note:
    """One key.

    Attributes:
        about: What it does, with its unit.
        default: The value that an absent key stands for; ``None`` where it depends on others.
        otherwise: That dependence, in words.
        differs: How SimpleTuner differs; empty where it does not.
    """

    about: str
    default: Plain | None = None
    otherwise: str = ""
    differs: str = ""


_ENTRY = "for entries of the data file that do not say"
_DRAWN_ANEW = "here every use draws another sample, as with `vae_cache_moments`"

MODEL_NOTES: Mapping[str, Note] = {
    "model_type": Note("train an adapter (`lora`) or the denoiser itself", otherwise="required"),
    "model_family": Note("which network", otherwise="required", differs="now says `pixart`"),
    "model_flavour": Note("a published checkpoint of the family", otherwise="the family's first"),
    "pretrained_model_name_or_path": Note("folder of a diffusers pipeline, or hub id", otherwise="`model_flavour`'s"),
    "pretrained_vae_model_name_or_path": Note("another VAE: folder or hub id", otherwise="the model's own"),
    "revision": Note("branch, tag or commit on the hub", "", differs="here `plan` hashes folders"),
    "variant": Note("weight files with this word in their names, such as `fp16`", ""),
    "lora_type": Note("`standard`: LoRA or DoRA; `lycoris`: LoKr or LoHa by `lycoris_config`", "standard"),
    "lora_rank": Note("width of the adapter", 16),
    "lora_alpha": Note("the adapter counts `lora_alpha / lora_rank`", otherwise="`lora_rank`"),
    "lora_dropout": Note("share of an adapter's inputs left out", 0.1, differs="here 0 for `olora` and `pissa`"),
    "lora_init_type": Note("what the adapter starts from", "default"),
    "peft_lora_target_modules": Note("names of the adapted layers", otherwise="attention's projections"),
    "use_dora": Note("train magnitudes apart from directions", False),
    "init_lora": Note("adapter to start from: folder or file", otherwise="none"),
    "lycoris_config": Note("LyCORIS's own JSON: object or file", otherwise="none", differs="runs on PEFT"),
    "layer_freeze_strategy": Note("`bitfit` trains biases only", "none"),
    "gradient_checkpointing": Note("compute activations again instead of keeping them: less memory, slower", True),
    "gradient_checkpointing_interval": Note("recompute every n-th block", 1),
    "base_model_precision": Note("how the frozen base under a LoRA is stored", "no_change"),
    "text_encoder_1_precision": Note("how the frozen text encoder is stored; of SDXL, CLIP-L", "no_change"),
    "text_encoder_2_precision": Note("the same of SDXL's OpenCLIP-bigG", "no_change"),
    "text_encoder_3_precision": Note("no family has so many text encoders", "no_change"),
    "text_encoder_4_precision": Note("no family has so many text encoders", "no_change"),
    "quantize_via": Note("where weights are rounded; `cpu` keeps the whole ones off the GPU", "accelerator"),
    "attention_mechanism": Note("kernel of softmax attention", "diffusers"),
    "sana_complex_human_instruction": Note(
        "text before every caption: text, file, list, `true` or `false`",
        otherwise="Sana's own",
        differs="here kept whole",
    ),
    "tokenizer_max_length": Note("tokens per caption of PixArt", otherwise="300"),
    "vae_dtype": Note("dtype that latents are stored in", "fp32", differs="there `bf16`, and of the VAE itself"),
    "vae_batch_size": Note("pictures encoded at once", 4),
    "vae_cache_moments": Note("keep the VAE's distribution, and draw another sample each epoch", False, differs="ours"),
    "vae_cache_disable": Note(
        "encode pictures while training, at every use, and keep nothing; " + _ENTRY, False, differs=_DRAWN_ANEW
    ),
    "vae_cache_ondemand": Note("encode pictures while training, once, into the store; " + _ENTRY, False),
    "vae_cache_clear_each_epoch": Note("new latents each epoch; here `vae_cache_moments` is what does that", False),
    "text_encoder_batch_size": Note("captions encoded at once", 16, differs="there 1"),
}

TRAIN_NOTES: Mapping[str, Note] = {
    "max_train_steps": Note("optimizer steps; 0 to count epochs", otherwise="0, and one epoch"),
    "num_train_epochs": Note("epochs; 0 to count steps", otherwise="1 while `max_train_steps` is not set"),
    "train_batch_size": Note("pictures at once, of datasets that do not say", 4),
    "gradient_accumulation_steps": Note("batches per optimizer step", 1),
    "mixed_precision": Note(
        "autocast; trained weights are float32 either way", "bf16", differs="there trained in bf16"
    ),
    "optimizer": Note("which optimizer", "torch-adamw", differs="there `adamw_bf16`, on bf16 weights"),
    "optimizer_config": Note("its further settings: `name=value,name=value`", ""),
    "adam_beta1": Note("decay of the mean of gradients", otherwise="the optimizer's"),
    "adam_beta2": Note("decay of the mean of their squares", otherwise="the optimizer's"),
    "adam_weight_decay": Note("decay of weights", otherwise="the optimizer's"),
    "adam_epsilon": Note("keeps AdamW from dividing by 0", otherwise="the optimizer's"),
    "learning_rate": Note("size of a step", otherwise="4e-07; 1.0 for `prodigy`"),
    "lr_scheduler": Note("how the rate changes", "constant_with_warmup", differs="there waves as long as the warmup"),
    "lr_warmup_steps": Note("optimizer steps in which it rises", 0),
    "lr_end": Note("floor of `polynomial` and `sine`", 0.0, differs="there 4e-7"),
    "lr_power": Note("exponent of `polynomial`", 1.0, differs="there 0.8"),
    "lr_num_cycles": Note("waves or restarts over the run", 1),
    "lr_scale": Note("the rate counts for one picture: times the pictures of a step, as many as this file says", False),
    "lr_scale_sqrt": Note("times their root instead", False),
    "max_grad_norm": Note("clip gradients above; 0 never", otherwise="2.0; 0.01 for PixArt", differs="there a limit"),
    "grad_clip_method": Note("clip the norm, or each value", "norm", differs="there `value`"),
    "caption_dropout_probability": Note("share of samples trained without their caption", 0.1),
    "disable_segmented_timestep_sampling": Note("draw a batch's timesteps singly", False),
    "seed": Note("of all that is drawn", otherwise="42", differs="there none"),
    "checkpoint_step_interval": Note("optimizer steps between checkpoints; 0 for the end only", 500),
    "checkpoint_epoch_interval": Note("epochs between checkpoints; 0 for none", 0),
    "checkpoints_total_limit": Note("checkpoints kept", 5),
    "resume_from_checkpoint": Note("`latest`, a name, or empty to start afresh", "latest"),
    "log_step_interval": Note("optimizer steps between logged points", 1, differs="ours"),
    "data_backend_sampling": Note("how datasets take turns", "auto-weighting"),
}

MACHINE_NOTES: Mapping[str, Note] = {
    "num_train_processes": Note("processes of the pod that train together", otherwise="one per GPU"),
    "num_machines": Note("pods that train together, through a Kubeflow Trainer TrainJob", 1),
    "fsdp_enable": Note("share weights and optimizer out among them (FSDP2)", False),
    "fsdp_version": Note("2 is the only one left", 2),
    "fsdp_reshard_after_forward": Note("let a block's weights go until the backward pass", True),
    "fsdp_auto_wrap_policy": Note("gather blocks singly, or everything at once", "TRANSFORMER_BASED_WRAP"),
    "fsdp_transformer_layer_cls_to_wrap": Note("classes of the blocks", otherwise="the network's own"),
    "dynamo_backend": Note("torch.compile: which backend", "no"),
    "dynamo_mode": Note("what inductor tries", "default"),
    "dynamo_dynamic": Note("graphs for any shape instead of one for each", False),
    "dynamo_fullgraph": Note("a piece that cannot be traced is an error", False),
    "dynamo_use_regional_compilation": Note(
        "compile the repeated blocks, not the whole", otherwise="`true` with a backend", differs="there `false`"
    ),
}

OBJECTIVE_NOTES: Mapping[str, Note] = {
    "snr_gamma": Note("min-SNR weighting; 0 for none", 0.0),
    "snr_weight": Note("factor of an unweighted loss", 1.0),
    "use_soft_min_snr": Note("soft min-SNR weighting", False, differs="there read and not used"),
    "soft_min_snr_sigma_data": Note("its sigma", otherwise="from `snr_gamma`"),
    "loss_type": Note("squares, or Huber's", "l2"),
    "huber_schedule": Note("how `huber_c` follows the noise", "snr"),
    "huber_c": Note("where Huber's losses turn linear", 0.1),
    "offset_noise": Note("shift a channel's noise as a whole", False),
    "noise_offset": Note("deviation of that shift", 0.1),
    "noise_offset_probability": Note("share of batches with it", 0.25),
    "input_perturbation": Note("deviation of noise that only the input gets", 0.0),
    "input_perturbation_steps": Note("steps in which it falls to 0; 0 keeps it", 0),
    "prediction_type": Note("what the model predicts", "", differs="here saved with the pipeline"),
    "rescale_betas_zero_snr": Note("end the schedule at pure noise", otherwise="the base's"),
    "inference_scheduler_timestep_spacing": Note(
        "spacing of drawing", otherwise="the base's", differs="there `trailing`"
    ),
    "timestep_bias_strategy": Note("which timesteps are drawn more often", "none", differs="there inside each segment"),
    "timestep_bias_portion": Note("their share of the range", 0.25),
    "timestep_bias_multiplier": Note("how much more often", 1.0),
    "timestep_bias_begin": Note("first timestep of `range`", 0),
    "timestep_bias_end": Note("the timestep after its last", 1000),
    "flow_schedule_shift": Note("shift of sigmas; 0 for none", 3.0, differs="there not used for Sana"),
    "flow_schedule_auto_shift": Note("shift by the number of tokens", False, differs="there tokens of 2x2 latents"),
    "flow_sigmoid_scale": Note("deviation before the sigmoid", 1.0),
    "flow_use_uniform_schedule": Note("draw sigmas evenly", False, differs="there always so for Sana"),
    "flow_use_beta_schedule": Note("draw sigmas from a beta density", False),
    "flow_beta_schedule_alpha": Note("its alpha", 2.0),
    "flow_beta_schedule_beta": Note("its beta", 2.0),
    "use_ema": Note("average the trained weights; the averages are exported", False),
    "ema_decay": Note("most of the old average that is kept", 0.995),
    "ema_update_interval": Note("optimizer steps between updates", 1),
    "ema_device": Note("where averages are kept", "cpu"),
    "ema_cpu_only": Note("never move them to the GPU", False),
    "ema_warmup_steps": Note("copy the weights before this step", 0),
    "ema_validation": Note(
        "what is evaluated; with `use_ema`, only `ema_only`", "ema_only", differs="there `comparison`"
    ),
    "flow_custom_timesteps": Note("sigmas or timesteps to draw from, in place of a density", otherwise="none"),
    "flow_timesteps_mode": Note("draw them by chance, or take them in turn", "fixed-list"),
    "diff2flow_enabled": Note("PixArt, SDXL: read the prediction as a flow", False),
    "diff2flow_loss": Note("and compare that with the flow", False),
    "scheduled_sampling_max_step_offset": Note("timesteps that a rollout takes at most; 0 for no rollouts", 0),
    "scheduled_sampling_strategy": Note("which lengths are drawn more often", "uniform"),
    "scheduled_sampling_probability": Note("share of samples that are rolled out", 0.0),
    "scheduled_sampling_ramp_steps": Note("optimizer steps from `prob_start` to `prob_end`; 0 for no ramp", 0),
    "scheduled_sampling_start_step": Note("optimizer step at which the ramp begins", 0),
    "scheduled_sampling_prob_start": Note("share before the ramp", 0.0),
    "scheduled_sampling_prob_end": Note("share after it", 0.5),
    "scheduled_sampling_ramp_shape": Note("straight, or half a wave", "linear"),
    "scheduled_sampling_sampler": Note("what solves the way down", "unipc"),
    "scheduled_sampling_order": Note("its order: `unipc` 1 to 3, `dpm` 1 or 2", 2),
    "scheduled_sampling_reflexflow": Note("Sana: ReflexFlow's terms for what was rolled out", otherwise="`true`"),
    "scheduled_sampling_reflexflow_alpha": Note("more weight where the rollout changed the prediction", 1.0),
    "scheduled_sampling_reflexflow_beta1": Note("weight of the direction back", 10.0),
    "scheduled_sampling_reflexflow_beta2": Note("weight of the loss proper", 1.0),
    "masked_loss_probability": Note(
        "share of samples whose mask is used", 1.0, differs="there per batch, for `segmentation` only"
    ),
    "nonfinite_loss": Note("`stop`, or `skip` such updates; the batch is kept either way", "stop", differs="ours"),
}

EVALUATE_NOTES: Mapping[str, Note] = {
    "validation_resolution": Note("edge, or `WxH,WxH`, in pixels", "1024x1024", differs="there 256"),
    "validation_guidance": Note("guidance of pictures", 7.5),
    "validation_num_inference_steps": Note("steps per picture", 30),
    "validation_prompt": Note("a prompt to draw", ""),
    "validation_negative_prompt": Note("what to draw away from", "", differs='there "blurry, cropped, ugly"'),
    "validation_seed": Note("seed of each prompt's first picture", otherwise="`seed`"),
    "user_prompt_library": Note("prompts by short name: file or object", otherwise="none"),
    "num_validation_images": Note("pictures per prompt and size", 1),
    "evaluation_type": Note("`clip` scores pictures", "none"),
    "pretrained_evaluation_model_name_or_path": Note(
        "the CLIP that scores", otherwise="`openai/clip-vit-large-patch14-336` with `clip`"
    ),
    "num_eval_images": Note("samples of the held-out loss, per dataset", 4, differs="there batches"),
    "eval_timesteps": Note("noise levels per sample", 28),
    "eval_dataset_id": Note("the one held-out dataset to use", otherwise="all"),
    "eval_loss_disable": Note("no held-out loss", False),
}

PUBLISH_NOTES: Mapping[str, Note] = {
    "output_dir": Note("folder of a run on this machine, unless `--out` names one; a cluster has none", ""),
    "push_to_hub": Note("upload the model if it is better than the last", False),
    "hub_model_id": Note("`namespace/name`", "", differs="there `tracker_project_name`, if empty"),
    "model_card_private": Note("a private repository", True),
    "model_card_safe_for_work": Note("say so in the card", False),
    "model_card_note": Note("text for the card", ""),
    "report_to": Note("where metrics go", otherwise="MLflow where it is set up", differs="there wandb and others"),
    "tracker_project_name": Note("MLflow's experiment", ""),
    "tracker_run_name": Note("MLflow's run", ""),
}

DATA_NOTES: Mapping[str, Note] = {
    "data_backend_config": Note("the data file", otherwise="given by `--data`"),
    "resolution": Note(f"edge in pixels, or megapixels, {_ENTRY}", 1024.0),
    "resolution_type": Note(f"unit of sizes, {_ENTRY}", "pixel_area"),
    "caption_strategy": Note(f"where captions come from, {_ENTRY}", "filename"),
    "instance_prompt": Note(f"caption of `instanceprompt`, {_ENTRY}", otherwise="none"),
    "minimum_image_size": Note(f"leave out smaller pictures, {_ENTRY}", otherwise="none"),
    "maximum_image_size": Note(f"shrink larger ones before cropping, {_ENTRY}", otherwise="none"),
    "target_downsample_size": Note(f"to this size, {_ENTRY}", otherwise="none"),
    "aspect_bucket_rounding": Note("decimals of a bucket's aspect ratio", 2),
    "aspect_bucket_alignment": Note("edges are multiples of this many pixels", 64),
    "max_upscale_threshold": Note(
        "leave out pictures that would be enlarged by more than this share", otherwise="none"
    ),
    "conditioning_multidataset_sampling": Note("one mask dataset per dataset of pictures", otherwise="`random`"),
    "max_skipped_share": Note("share of pictures that may be unreadable", 0.1, differs="ours"),
    "allow_dataset_oversubscription": Note("raise `repeats` where a dataset fills no batch", False),
}

GROUPS: Mapping[str, Mapping[str, Note]] = {
    "Model, adapter and caches": MODEL_NOTES,
    "Training": TRAIN_NOTES,
    "Processes and compilation": MACHINE_NOTES,
    "Noise, loss and averages": OBJECTIVE_NOTES,
    "Evaluation": EVALUATE_NOTES,
    "Publishing and tracking": PUBLISH_NOTES,
    "Data": DATA_NOTES,
}
NOTES: Mapping[str, Note] = {name: note for group in GROUPS.values() for name, note in group.items()}
