"""The keys of the entries of ``multidatabackend.json``."""

from kubetuner.config.data_file import reasons
from kubetuner.config.keys import Alias, Foreign, Key, Rule, Schema, Unneeded, one_of

_TYPE = Key("str", one_of("local", "gcs", "huggingface", "csv", "aws"), refused=reasons.TYPES)
PATH_MATCHES = one_of("auto", "contains", "glob", "regex", "exact")
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
_LIKE_PICTURES = "masks are resized and cropped exactly as their pictures are"
_WITH_PICTURES = "a mask is used whenever its picture is"
_NO_CAPTIONS = "masks have no captions"

_COMMON: dict[str, Rule] = {
    "id": Key("str", nullable=False),
    "dataset_type": Key(
        "str", one_of("image", "eval", "text_embeds", "image_embeds", "conditioning"), refused=reasons.DATASET_TYPES
    ),
    "disabled": Key("bool"),
    "write_batch_size": Unneeded("int", "shards are written whole"),
    "read_batch_size": Unneeded("int", "pictures are read as they are needed"),
    "text_cache_ondemand": Foreign(reasons.TEXT_CACHE, (False,)),
    "text_cache_disable": Foreign(reasons.TEXT_CACHE, (False,)),
    "preserve_data_backend_cache": Unneeded("bool", _LISTED_ANEW),
    "skip_file_discovery": Key("str"),
    "compress_cache": Unneeded("bool", reasons.COMPRESSED),
    "hash_filenames": Unneeded("bool", _STORE),
    "shorten_filenames": Unneeded("bool", _STORE),
    "video": Foreign(reasons.NO_VIDEO),
    "audio": Foreign(reasons.NO_VIDEO),
}

_STORAGE: dict[str, Rule] = {
    "type": _TYPE,
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
    "streaming": Unneeded("bool", "parquet files are always read one after the other, and need not fit the disk"),
    "dataset_config": Foreign(reasons.HUB_CONFIG),
    "data_files": Foreign(reasons.HUB_CONFIG),
    "width_column": Unneeded("str", "sizes are read from the columns width and height, else from the pictures"),
    "height_column": Unneeded("str", "sizes are read from the columns width and height, else from the pictures"),
    "webshart": Foreign(reasons.WEBSHART),
    "auto_load": Unneeded("bool", "datasets are read when a step needs them"),
    "filter_func": Key("json"),
    "composite_image_config": Key("json"),
}

_PICTURES: dict[str, Rule] = {
    "instance_data_dir": Key("str"),
    "caption_strategy": Key(
        "str",
        one_of("filename", "textfile", "instanceprompt", "csv", "huggingface", "parquet"),
        refused=reasons.WEBSHART_CAPTIONS,
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
        refused=reasons.CROP_STYLES,
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
        refused=reasons.WEBSHART_CAPTIONS,
    ),
    "disable_multiline_split": Key("bool"),
    "caption_file_extensions": Foreign(reasons.CAPTION_FILES),
    "text_embeds": Key("str"),
    "image_embeds": Key("str"),
    "default": Foreign(reasons.NO_DEFAULT, (False,)),
    "disable_validation": Unneeded("bool", reasons.PROMPTS_ALONE),
    "max_num_samples": Key("int", low=1),
    "train_batch_size": Key("int", low=1),
    "start_epoch": Key("int", low=0),
    "end_epoch": Key("int", low=1),
    "start_step": Key("int", low=0),
    "end_step": Key("int", low=1),
    "timestep_sampling_offset": Key("float"),
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
    "scan_for_errors": Unneeded("bool", reasons.SCANNED),
    "delete_unwanted_images": Foreign(reasons.DELETING, (False,)),
    "delete_problematic_images": Foreign(reasons.DELETING, (False,)),
    "override_dataset_config": Unneeded("bool", reasons.NOT_STORED),
    "metadata_update_interval": Unneeded("int", "listings are not kept between runs"),
    "disable_vae_cache": Foreign("SimpleTuner has no such key; its name is vae_cache_disable."),
    "cache_dir": Unneeded("str", _STORE),
}

# Of an entry that says where a cache lies.
_CACHES: dict[str, Rule] = {
    "type": _TYPE,
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
    **{name: Unneeded("float", _WITH_PICTURES) for name in (
        "repeats", "probability", "train_batch_size", "timestep_sampling_offset",
    )},
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
    "conditioning_type": Key("str", one_of("mask", "segmentation"), refused=reasons.CONDITIONING_TYPES),
    "conditioning": Foreign(_GENERATED),
    "max_num_samples": Foreign("Masks are chosen by their pictures; the limit belongs to the pictures' entry."),
    **{name: _PICTURES[name] for name in (
        "metadata_backend", "default", "disable_validation", "scan_for_errors", "delete_unwanted_images",
        "delete_problematic_images", "override_dataset_config", "metadata_update_interval", "cache_dir",
        "cache_dir_vae",
    )},
}  # fmt: skip

_ALIASES: dict[str, Alias] = {
    "disable": Alias("disabled"),
    "instance_data_root": Alias("instance_data_dir"),
    "instance_data": Alias("instance_data_dir"),
    "aws_data_prefix": Alias("instance_data_dir"),
    "is_regularization_data": Alias("is_regularisation_data"),
}

FILTER_SCHEMA = Schema(
    rules={
        "collection": Key("json"),
        "quality_thresholds": Key("json"),
        "quality_column": Key("str"),
        "min_width": Key("int", low=1),
        "min_height": Key("int", low=1),
        "path_include": Key("texts"),
        "path_exclude": Key("texts"),
        "path_match": Key("str", PATH_MATCHES),
        "path": Key("json"),
    }
)
FILTER_PATH_SCHEMA = Schema(
    rules={"include": Key("texts"), "exclude": Key("texts"), "mode": Key("str", PATH_MATCHES)},
)
COMPOSITE_SCHEMA = Schema(
    rules={"enabled": Key("bool"), "image_count": Key("int", low=1), "select_index": Key("int", low=0)}
)
METADATA_TABLE_SCHEMA = Schema(
    rules={
        "path": Key("str"),
        "filename_column": Key("str"),
        "caption_column": Key("texts"),
        "fallback_caption_column": Key("str"),
        "identifier_includes_extension": Key("bool"),
        "width_column": Key("str"),
        "height_column": Key("str"),
    }
)
PICTURE_SCHEMA = Schema(rules={**_COMMON, **_STORAGE, **_PICTURES}, aliases=_ALIASES)
MASK_SCHEMA = Schema(rules={**_COMMON, **_STORAGE, **_MASKS}, aliases=_ALIASES)
LATENTS_SCHEMA = Schema(rules={**_COMMON, **_CACHES}, aliases={"disable": Alias("disabled")})
TEXT_SCHEMA = Schema(rules={**_COMMON, **_TEXTS}, aliases={"disable": Alias("disabled")})
