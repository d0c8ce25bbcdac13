"""Why values and keys of SimpleTuner's data file are refused, or have no effect: one place for both files."""

TYPES = {
    "webshart": (
        "its shards are read by a library of SimpleTuner's author, which kubetuner does not bring along. Unpack them "
        "into a folder or bucket, or make parquet files of them (type huggingface)."
    ),
    "memory": "nothing outlives the process there, and every step is a process, or a pod, of its own.",
}
DATASET_TYPES = {
    **dict.fromkeys(("video", "audio"), "the model families of kubetuner learn from pictures alone."),
    "caption": "captions without pictures train text models; a dataset's captions are named by caption_strategy.",
    "conditioning_image_embeds": (
        "these are embeddings of pictures that a model is shown beside the text, which no family of kubetuner takes."
    ),
}
_NO_CONTROL = (
    "the model is then shown another picture beside the text, which no family of kubetuner takes; masks are what "
    "conditioning is used for here."
)
CONDITIONING_TYPES = dict.fromkeys(("controlnet", "reference_strict", "reference_loose"), _NO_CONTROL)
CROP_STYLES = {
    "face": (
        "finding faces needs the pixels, and the plan places every crop by the sizes in the headers alone. Cut such "
        "pictures beforehand, or keep what is around faces with crop false."
    )
}
WEBSHART = "It belongs to type webshart, which is refused."
NO_VIDEO = "It belongs to datasets of films or sound, and the model families of kubetuner learn from pictures alone."
HUB_CONFIG = (
    "Which files of a repository are read is said by split and by instance_data_dir, a folder inside the repository; a "
    "configuration usually is a folder of its name."
)
CAPTION_FILES = (
    "A caption beside a picture is a .txt file; rename others, or put the captions into a table (caption_strategy "
    "parquet)."
)
WEBSHART_CAPTIONS = {"webshart": "it goes with type webshart, which is refused too."}

TEXT_CACHE = (
    "Captions are encoded once, before training, and kept by content: so no text encoder lies beside the model in "
    "memory while it is trained. The plan's page says how many bytes that is, and KUBETUNER_STORE may be a bucket."
)
DELETING = (
    "kubetuner never deletes a picture of yours. What cannot be used is left out and named with the reason, on the "
    "plan's page and in the artifacts of download_dataset and cache_vae; delete it yourself where you want to."
)
NO_DEFAULT = "Only an entry with dataset_type text_embeds can be the default one; pictures are drawn from every entry."
COMPRESSED = "shards are memory-mapped as they were written, so there is nothing to unpack"
SCANNED = "every shard's checksum is compared before a run first reads from it"
NOT_STORED = "no listing or setting of an earlier run is kept, so this file always counts"
PROMPTS_ALONE = "validation pictures are drawn from prompts alone, and none starts from a dataset's picture"
