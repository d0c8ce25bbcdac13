"""The keys of the entries of ``multidatabackend.json``."""

from kubetuner.config.keys import Alias, Foreign, Key, Later, Rule, Schema, Unneeded, one_of

TYPES_LATER = frozenset({"aws", "csv", "huggingface", "webshart", "memory"})
DATASET_TYPES_LATER = frozenset(
    {"image_embeds", "conditioning", "conditioning_image_embeds", "video", "audio", "caption"}
)
_STORE = "caches are artifacts, kept by content in the store"
_S3 = "S3 storage is"
_CSV = "csv storage is"
_HUB = "datasets from the hub are"
_CURRICULUM = "a schedule per dataset is"
_CONDITIONING = "conditioning datasets are"

_COMMON: dict[str, Rule] = {
    "id": Key("str", nullable=False),
    "type": Key("str", one_of("local", "gcs"), later=TYPES_LATER),
    "dataset_type": Key("str", one_of("image", "eval", "text_embeds"), later=DATASET_TYPES_LATER),
    "disabled": Key("bool"),
    "write_batch_size": Unneeded("int", "shards are written whole"),
    "read_batch_size": Unneeded("int", "pictures are read as they are needed"),
    "text_cache_ondemand": Later("encoding captions while training is", (False,)),
    "text_cache_disable": Later("training without cached text embeddings is", (False,)),
    "preserve_data_backend_cache": Later("keeping listings between runs is", (False,)),
    "compress_cache": Later("compression of cached tensors is", (False,)),
    **{f"aws_{name}": Later(_S3) for name in ("bucket_name", "endpoint_url", "access_key_id", "secret_access_key",
                                               "region_name", "session_token", "max_pool_connections")},
    "csv_file": Later(_CSV),
    "csv_caption_column": Later(_CSV),
    "csv_url_column": Later(_CSV),
    "csv_cache_dir": Later(_CSV),
    "hash_filenames": Unneeded("bool", _STORE),
}  # fmt: skip

_PICTURES: dict[str, Rule] = {
    "instance_data_dir": Key("str"),
    "caption_strategy": Key(
        "str",
        one_of("filename", "textfile", "instanceprompt"),
        later=frozenset({"parquet", "csv", "huggingface", "webshart"}),
    ),
    "instance_prompt": Key("texts"),
    "prepend_instance_prompt": Key("bool"),
    "only_instance_prompt": Key("bool"),
    "resolution": Key("float", above=0),
    "resolution_type": Key("str", one_of("pixel", "area", "pixel_area")),
    "crop": Key("bool"),
    "crop_style": Key(
        "str",
        {"random": "random", "center": "center", "centre": "center", "corner": "corner"},
        later=frozenset({"face"}),
    ),
    "crop_aspect": Key("str", one_of("square", "preserve"), later=frozenset({"closest", "random"})),
    "crop_aspect_buckets": Later("cropping to a list of aspect ratios is"),
    "minimum_image_size": Key("float", low=0),
    "maximum_image_size": Key("float", above=0),
    "target_downsample_size": Key("float", above=0),
    "minimum_aspect_ratio": Later("a limit on aspect ratios is"),
    "maximum_aspect_ratio": Later("a limit on aspect ratios is"),
    "max_upscale_threshold": Later("a limit on upscaling is"),
    "aspect_bucket_alignment": Key("int", low=8, high=64),
    "aspect_bucket_rounding": Key("int", low=1, high=9),
    "repeats": Key("int", low=0),
    "probability": Key("float", above=0),
    "is_regularisation_data": Key("bool"),
    "cache_dir_vae": Key("str"),
    "metadata_backend": Key(
        "str",
        {"discovery": "discovery", "json": "discovery"},
        later=frozenset({"parquet", "huggingface", "webshart"}),
    ),
    "skip_file_discovery": Later("skipping the listing is", ("",)),
    "text_embeds": Key("str"),
    "image_embeds": Later("a separate store of latents is"),
    "default": Later("a default picture dataset is", (False,)),
    "disable_validation": Later("switching off checks is", (False,)),
    "max_num_samples": Later("training on a part of a dataset is"),
    "train_batch_size": Later("a batch size per dataset is"),
    "start_epoch": Later(_CURRICULUM, (0, 1)),
    "end_epoch": Later(_CURRICULUM),
    "start_step": Later(_CURRICULUM, (0,)),
    "end_step": Later(_CURRICULUM),
    "timestep_sampling_offset": Later("an offset of timesteps per dataset is", (0,)),
    "parquet": Later("captions from parquet files are"),
    "caption_shuffle": Later("shuffling of captions is"),
    "caption_filter_list": Later("filtering of captions is"),
    "conditioning_data": Later(_CONDITIONING),
    "conditioning_type": Later(_CONDITIONING),
    "conditioning": Later(_CONDITIONING),
    "vae_cache_clear_each_epoch": Later("encoding latents anew each epoch is", (False,)),
    "vae_cache_disable": Later("training without cached latents is", (False,)),
    "vae_cache_ondemand": Later("encoding latents while training is", (False,)),
    "scan_for_errors": Later("rescanning caches (records are checked as they are read) is", (False,)),
    "delete_unwanted_images": Later("deleting pictures is", (False,)),
    "delete_problematic_images": Later("deleting pictures is", (False,)),
    "override_dataset_config": Later("overriding a stored configuration (none is stored) is", (False, True)),
    "metadata_update_interval": Unneeded("int", "listings are not kept between runs"),
    "disable_vae_cache": Foreign("SimpleTuner has no such key; its name is vae_cache_disable."),
    "cache_dir": Unneeded("str", _STORE),
    **{name: Later(_HUB) for name in ("huggingface", "dataset_name", "split", "revision", "image_column",
                                       "caption_column", "filter_func", "num_proc", "auto_load",
                                       "composite_image_config")},
}  # fmt: skip

_TEXTS: dict[str, Rule] = {
    "default": Key("bool"),
    "cache_dir": Key("str"),
    "caption_filter_list": Later("filtering of captions is"),
}

_ALIASES: dict[str, Alias] = {
    "disable": Alias("disabled"),
    "instance_data_root": Alias("instance_data_dir"),
    "instance_data": Alias("instance_data_dir"),
    "is_regularization_data": Alias("is_regularisation_data"),
}

PICTURE_SCHEMA = Schema(rules={**_COMMON, **_PICTURES}, aliases=_ALIASES)
TEXT_SCHEMA = Schema(rules={**_COMMON, **_TEXTS}, aliases={"disable": Alias("disabled")})
