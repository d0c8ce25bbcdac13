"""Where datasets come from, as ``download_dataset`` is told."""

from typing import Literal

from kubetuner.config.sections.base import Section

MaskKind = Literal["mask", "segmentation"]


class TableColumns(Section):
    """A table with one picture a row (``type: csv``).

    Attributes:
        file: ``csv_file``: a ``.csv`` or ``.parquet`` file.
        url_column: ``csv_url_column``: an ``http(s)://`` address, or a path relative to ``instance_data_dir``.
        caption_column: ``csv_caption_column``; empty when captions come from elsewhere.
    """

    file: str
    url_column: str = "url"
    caption_column: str = ""


class HubDataset(Section):
    """A dataset repository on the hub (``type: huggingface``).

    Attributes:
        name: ``dataset_name``: ``namespace/name``.
        revision: Branch, tag or commit; empty for ``main``. ``plan`` resolves it to a commit.
        split: Which parquet files are read, or which folder where all are named after splits.
        image_column: Column of parquet files that holds the pictures.
        caption_column: Column of parquet files that holds captions; empty when captions come from elsewhere.
    """

    name: str
    revision: str = ""
    split: str = "train"
    image_column: str = "image"
    caption_column: str = ""


class Bucket(Section):
    """A bucket of S3 or a compatible store (``type: aws``); credentials come from the environment.

    Attributes:
        name: ``aws_bucket_name``.
        endpoint_url: ``aws_endpoint_url``; empty for Amazon's own.
        region: ``aws_region_name``; empty for the environment's.
    """

    name: str
    endpoint_url: str = ""
    region: str = ""


class MetadataTable(Section):
    """A parquet file that tells of pictures elsewhere (``metadata_backend: parquet``): their captions, sizes or both.

    Attributes:
        path: A file (``local``), a name in the bucket (``aws``, ``gcs``) or ``gs://bucket/name`` (``gcs``).
        filename_column: A picture's path below ``instance_data_dir``, or its name where no other has it.
        caption_columns: ``caption_column``: where several hold a caption they are alternatives. Empty where captions
            come from elsewhere.
        fallback_caption_column: Read where they are all empty; empty for none.
        identifier_includes_extension: Whether ``filename_column`` has the files' extensions.
        width_column: Pixels of the upright picture, so that the plan need not open it; empty to have it measured.
        height_column: Likewise.
    """

    path: str
    filename_column: str = "id"
    caption_columns: tuple[str, ...] = ("description",)
    fallback_caption_column: str = ""
    identifier_includes_extension: bool = False
    width_column: str = ""
    height_column: str = ""


class PathFilter(Section):
    """Which pictures are taken in, by name (``path_include``, ``path_exclude`` and ``path_match`` of ``filter_func``).

    A pattern is compared with a picture's path below the dataset's root and with its bare name; one match is enough.

    Attributes:
        include: Names must match one of these; empty for all.
        exclude: Names must match none of these.
        match: ``contains``, ``exact``, ``glob`` (the whole name; case counts), ``regex`` (anywhere), or ``auto``: a
            regular expression after ``re:``, a glob with ``*`` or ``?`` in it, else ``contains``.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    match: Literal["auto", "contains", "glob", "regex", "exact"] = "auto"


class RowFilter(Section):
    """Which rows of a hub dataset are taken in, by their columns (the rest of ``filter_func``).

    Attributes:
        collection: The column ``collection``, or one of the list in it, must be one of these; ``None`` for any.
        quality_column: Column that holds an object of numbers.
        quality_thresholds: Name in that object, and the smallest number allowed.
        min_width: Smallest value of the column ``width``; 0 for any.
        min_height: Smallest value of the column ``height``; 0 for any.
    """

    collection: tuple[str | int, ...] | None = None
    quality_column: str = "quality_assessment"
    quality_thresholds: tuple[tuple[str, float], ...] = ()
    min_width: int = 0
    min_height: int = 0


class Composite(Section):
    """Pictures that stand side by side in one file (``composite_image_config``); one of them is the sample.

    Attributes:
        count: ``image_count``: how many, all of one width; at least 2.
        index: ``select_index``: which, counted from 0 at the left.
    """

    count: int
    index: int = 0


class DatasetSource(Section):
    """Where one dataset's pictures and captions come from (an entry of the data file).

    Attributes:
        id: Unique name of the backend.
        dataset_type: ``image`` is trained on, ``eval`` is held out.
        type: Kind of storage.
        instance_data_dir: Folder of a ``local`` dataset; ``gs://bucket/prefix`` of ``gcs``; prefix inside the bucket
            (``aws``) or folder inside the repository (``huggingface``); where the paths of a table start (``csv``).
        table: With ``csv``.
        hub: With ``huggingface``.
        bucket: With ``aws``.
        metadata_table: With ``metadata_backend: parquet``.
        paths: Which pictures are taken in, by name; ``None`` for all.
        rows: Which rows of a ``huggingface`` dataset are taken in; ``None`` for all.
        composite: With pictures that stand side by side; ``None`` where a file is one picture.
        caption_strategy: ``filename``, ``textfile``, ``instanceprompt``, a table beside the pictures (``parquet``), or
            the source's own column: ``csv`` and ``huggingface``, with the type of that name.
        instance_prompt: One or several prompts for ``instanceprompt``, or to prepend.
        prepend_instance_prompt: Caption becomes "instance_prompt caption".
        only_instance_prompt: Caption becomes the instance prompt.
        disable_multiline_split: A caption file is one caption, not one per line.
        max_num_samples: So many pictures at most, chosen by ``id`` and always the same; ``None`` for all.
        revision: Digest of the listing (names, sizes, versions) or commit, resolved by ``plan``.
        newest: When the newest file was written (nanoseconds since 1970, 0 for unknown), resolved by ``plan``; what
            comes later is left out.
    """

    id: str
    dataset_type: Literal["image", "eval"] = "image"
    type: Literal["local", "gcs", "huggingface", "csv", "aws"] = "local"
    instance_data_dir: str = ""
    table: TableColumns | None = None
    hub: HubDataset | None = None
    bucket: Bucket | None = None
    metadata_table: MetadataTable | None = None
    paths: PathFilter | None = None
    rows: RowFilter | None = None
    composite: Composite | None = None
    caption_strategy: Literal["filename", "textfile", "instanceprompt", "csv", "huggingface", "parquet"] = "filename"
    instance_prompt: tuple[str, ...] = ()
    prepend_instance_prompt: bool = False
    only_instance_prompt: bool = False
    disable_multiline_split: bool = False
    max_num_samples: int | None = None
    revision: str = ""
    newest: int = 0


class MaskSource(Section):
    """A dataset of masks (``dataset_type: conditioning``).

    Attributes:
        source: Where they come from.
        kind: ``conditioning_type``: ``mask`` weights the loss by brightness, ``segmentation`` keeps what is not black.
        of: Ids of the picture datasets that name it in ``conditioning_data``; at least one.
    """

    source: DatasetSource
    kind: MaskKind
    of: tuple[str, ...]


class DownloadSection(Section):
    """Settings of ``download_dataset``.

    Attributes:
        datasets: Sources, in the order of the data file.
        masks: Sources of masks for some of ``datasets``, at most one for each.
        max_skipped_share: Share of undecodable pictures in 0..1 above which the step fails.
        on_demand: Ids of the datasets whose pictures training reads (``vae_cache_disable``, ``vae_cache_ondemand``).
    """

    datasets: tuple[DatasetSource, ...]
    masks: tuple[MaskSource, ...] = ()
    max_skipped_share: float = 0.1
    on_demand: tuple[str, ...] = ()
