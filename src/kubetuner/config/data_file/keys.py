"""The keys of the entries of ``multidatabackend.json``."""

from kubetuner.config.keys import Alias, Foreign, Key, Later, Rule, Schema, Unneeded, one_of

TYPES = ("local", "gcs", "huggingface", "csv", "aws")
TYPES_LATER = frozenset({"webshart", "memory"})
DATASET_TYPES_LATER = frozenset({"conditioning_image_embeds", "video", "audio", "caption"})
_STORE = "caches are artifacts, kept by content in the store"
_SECRET = (
    "Keys in this file would be written into the pipeline's parameters; put them into the environment of the pods "
    "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN) or use a role."
)
_LISTED_ANEW = "listings are not kept between runs; each plan lists the folder anew"
_GENERATED = (
    "Masks and control pictures are not made on the fly (random_masks, canny, depth, …): masks are files, which can be "
    "looked at and are cached. Make them once and name their entry in conditioning_data."
)
_MEASURED = "sizes are read from the pictures themselves, which a table may have outlived"
_LIKE_PICTURES = "masks are resized and cropped exactly as their pictures are"
_WITH_PICTURES = "a mask is used whenever its picture is"
_NO_CAPTIONS = "masks have no captions"

_COMMON: dict[str, Rule] = {
    "id": Key("str", nullable=False),
    "dataset_type": Key(
        "str", one_of("image", "eval", "text_embeds", "image_embeds", "conditioning"), later=DATASET_TYPES_LATER
    ),
    "disabled": Key("bool"),
    "write_batch_size": Unneeded("int", "shards are written whole"),
    "read_batch_size": Unneeded("int", "pictures are read as they are needed"),
    "text_cache_ondemand": Later("encoding captions while training is", (False,)),
    "text_cache_disable": Later("training without cached text embeddings is", (False,)),
    "preserve_data_backend_cache": Unneeded("bool", _LISTED_ANEW),
    "skip_file_discovery": Key("str"),
    "compress_cache": Later("compression of cached tensors is", (False,)),
    "hash_filenames": Unneeded("bool", _STORE),
}

_STORAGE: dict[str, Rule] = {
    "type": Key("str", one_of(*TYPES), later=TYPES_LATER),
    "aws_bucket_name": Key("str"),
    "aws_endpoint_url": Key("str"),
    "aws_region_name": Key("str"),
    "aws_access_key_id": Foreign(_SECRET),
    "aws_secret_access_key": Foreign(_SECRET),
    "aws_session_token": Foreign(_SECRET),
    "aws_max_pool_connections": Unneeded("int", "the number of connections is chosen here"),
    "csv_file": Key("str"),
    "csv_caption_column": Key("str"),
    "csv_url_column": Key("str"),
    "csv_cache_dir": Unneeded("str", _STORE),
    "dataset_name": Key("str"),
    "split": Key("str"),
    "revision": Key("str"),
    "image_column": Key("str"),
    "caption_column": Key("str"),
    "num_proc": Unneeded("int", "the number of threads is chosen here"),
    "auto_load": Unneeded("bool", "datasets are read when a step needs them"),
    "filter_func": Later("filtering of datasets from the hub is"),
    "composite_image_config": Later("cutting composite pictures is"),
}

_PICTURES: dict[str, Rule] = {
    "instance_data_dir": Key("str"),
    "caption_strategy": Key(
        "str",
        one_of("filename", "textfile", "instanceprompt", "csv", "huggingface", "parquet"),
        later=frozenset({"webshart"}),
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
    "crop_aspect": Key("str", one_of("square", "preserve", "closest", "random")),
    "crop_aspect_buckets": Key("json"),
    "minimum_image_size": Key("float", low=0),
    "maximum_image_size": Key("float", above=0),
    "target_downsample_size": Key("float", above=0),
    "minimum_aspect_ratio": Key("float", above=0),
    "maximum_aspect_ratio": Key("float", above=0),
    "max_upscale_threshold": Key("float", low=0),
    "aspect_bucket_alignment": Key("int", low=8, high=64),
    "aspect_bucket_rounding": Key("int", low=1, high=9),
    "repeats": Key("int", low=0),
    "probability": Key("float", above=0),
    "is_regularisation_data": Key("bool"),
    "cache_dir_vae": Key("str"),
    "metadata_backend": Key(
        "str",
        {"discovery": "discovery", "json": "discovery", "huggingface": "discovery", "parquet": "parquet"},
        later=frozenset({"webshart"}),
    ),
    "disable_multiline_split": Key("bool"),
    "text_embeds": Key("str"),
    "image_embeds": Key("str"),
    "default": Later("a default picture dataset is", (False,)),
    "disable_validation": Later("switching off checks is", (False,)),
    "max_num_samples": Key("int", low=1),
    "train_batch_size": Later("a batch size per dataset is"),
    "start_epoch": Key("int", low=0),
    "end_epoch": Key("int", low=1),
    "start_step": Key("int", low=0),
    "end_step": Key("int", low=1),
    "timestep_sampling_offset": Later("an offset of timesteps per dataset is", (0,)),
    "parquet": Key("json"),
    "caption_shuffle": Key("json"),
    "caption_filter_list": Foreign("It belongs to the entry with dataset_type text_embeds that the dataset uses."),
    "conditioning_data": Key("texts"),
    "conditioning_type": Foreign("It belongs to the entry with dataset_type conditioning that this one names."),
    "conditioning": Foreign(_GENERATED),
    "vae_batch_size": Key("int", low=1),
    "image_processing_batch_size": Unneeded("int", "pictures are prepared as they are needed"),
    "max_workers": Unneeded("int", "the number of workers follows the processors"),
    "vae_cache_clear_each_epoch": Key("bool"),
    "vae_cache_disable": Key("bool"),
    "vae_cache_ondemand": Key("bool"),
    "scan_for_errors": Later("rescanning caches (records are checked as they are read) is", (False,)),
    "delete_unwanted_images": Later("deleting pictures is", (False,)),
    "delete_problematic_images": Later("deleting pictures is", (False,)),
    "override_dataset_config": Later("overriding a stored configuration (none is stored) is", (False, True)),
    "metadata_update_interval": Unneeded("int", "listings are not kept between runs"),
    "disable_vae_cache": Foreign("SimpleTuner has no such key; its name is vae_cache_disable."),
    "cache_dir": Unneeded("str", _STORE),
}

# Of an entry that says where a cache lies.
_CACHES: dict[str, Rule] = {
    "type": Key("str", one_of(*TYPES), later=TYPES_LATER),
    "default": Key("bool"),
    "cache_dir": Key("str"),
    **{name: _STORAGE[name] for name in ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")},
    **{
        name: Unneeded("str", _STORE)
        for name in (
            "aws_bucket_name",
            "aws_endpoint_url",
            "aws_region_name",
            "instance_data_dir",
        )
    },
    "aws_max_pool_connections": _STORAGE["aws_max_pool_connections"],
}

_TEXTS: dict[str, Rule] = {**_CACHES, "caption_filter_list": Key("json")}

# Keys of a picture entry that an entry of masks may repeat; its pictures have already decided.
_MASKS: dict[str, Rule] = {
    **{name: Unneeded("float", _LIKE_PICTURES) for name in (
        "resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size", "minimum_aspect_ratio",
        "maximum_aspect_ratio", "max_upscale_threshold", "aspect_bucket_alignment", "aspect_bucket_rounding",
    )},
    **{name: Unneeded("str", _LIKE_PICTURES) for name in ("resolution_type", "crop_style", "crop_aspect")},
    **{name: Unneeded("bool", _LIKE_PICTURES) for name in (
        "crop", "vae_cache_clear_each_epoch", "vae_cache_disable", "vae_cache_ondemand",
    )},
    "crop_aspect_buckets": Unneeded("json", _LIKE_PICTURES),
    **{name: Unneeded("float", _WITH_PICTURES) for name in ("repeats", "probability", "train_batch_size")},
    **{name: Unneeded("int", _WITH_PICTURES) for name in (
        "start_epoch", "end_epoch", "start_step", "end_step", "vae_batch_size",
    )},
    "is_regularisation_data": Unneeded("bool", _WITH_PICTURES),
    **{name: Unneeded("str", _NO_CAPTIONS) for name in ("caption_strategy", "text_embeds")},
    **{name: Unneeded("bool", _NO_CAPTIONS) for name in (
        "prepend_instance_prompt", "only_instance_prompt", "disable_multiline_split",
    )},
    "instance_prompt": Unneeded("texts", _NO_CAPTIONS),
    **{name: Unneeded("json", _NO_CAPTIONS) for name in ("parquet", "caption_shuffle")},
    "instance_data_dir": Key("str"),
    "conditioning_type": Key(
        "str", one_of("mask", "segmentation"), later=frozenset({"controlnet", "reference_strict", "reference_loose"})
    ),
    "conditioning": Foreign(_GENERATED),
    "max_num_samples": Foreign("Masks are chosen by their pictures; the limit belongs to the pictures' entry."),
    **{name: _PICTURES[name] for name in (
        "metadata_backend", "disable_validation", "scan_for_errors", "delete_unwanted_images",
        "delete_problematic_images", "override_dataset_config", "metadata_update_interval", "cache_dir",
        "cache_dir_vae",
    )},
}  # fmt: skip

_ALIASES: dict[str, Alias] = {
    "disable": Alias("disabled"),
    "instance_data_root": Alias("instance_data_dir"),
    "instance_data": Alias("instance_data_dir"),
    "is_regularization_data": Alias("is_regularisation_data"),
}

CAPTION_TABLE_SCHEMA = Schema(
    rules={
        "path": Key("str"),
        "filename_column": Key("str"),
        "caption_column": Key("texts"),
        "fallback_caption_column": Key("str"),
        "identifier_includes_extension": Key("bool"),
        "width_column": Unneeded("str", _MEASURED),
        "height_column": Unneeded("str", _MEASURED),
    }
)
PICTURE_SCHEMA = Schema(rules={**_COMMON, **_STORAGE, **_PICTURES}, aliases=_ALIASES)
MASK_SCHEMA = Schema(rules={**_COMMON, **_STORAGE, **_MASKS}, aliases=_ALIASES)
LATENTS_SCHEMA = Schema(rules={**_COMMON, **_CACHES}, aliases={"disable": Alias("disabled")})
TEXT_SCHEMA = Schema(rules={**_COMMON, **_TEXTS}, aliases={"disable": Alias("disabled")})
