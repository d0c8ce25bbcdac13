"""How a dataset's pictures are sized, cut and cached."""

from typing import Literal

from kubetuner.config.sections.base import Section

VaeCache = Literal["ahead", "ondemand", "disabled"]


class Geometry(Section):
    """How one dataset's pictures become latents; see ``kubetuner.data.geometry`` for the arithmetic.

    Attributes:
        resolution: Edge in pixels (``pixel``, ``pixel_area``) or megapixels (``area``).
        resolution_type: Unit of ``resolution`` and of the three sizes below.
        crop: Crop to ``crop_aspect``; without it only the alignment remainder is cut.
        crop_style: Where the crop lies.
        crop_aspect: ``square`` puts every picture in bucket 1.0, ``preserve`` keeps its bucket, ``closest`` and
            ``random`` choose one of ``crop_aspect_buckets``.
        crop_aspect_buckets: Aspect ratios (width / height) with their weights; weights matter to ``random`` alone.
        minimum_image_size: Smaller pictures are skipped; ``None`` for no limit.
        minimum_aspect_ratio: Buckets (width / height) below it are left out; ``None`` for no limit.
        maximum_aspect_ratio: Buckets (width / height) above it are left out; ``None`` for no limit.
        maximum_image_size: With ``crop``, larger pictures are first brought to ``target_downsample_size``.
        target_downsample_size: See ``maximum_image_size``.
        max_upscale_threshold: Pictures that would be enlarged by more than this share (0.2: by 20 %) are left out;
            ``None`` for no limit.
        aspect_bucket_alignment: Edges are multiples of this many pixels.
        aspect_bucket_rounding: Decimals of a bucket's aspect ratio.
    """

    resolution: float = 1024.0
    resolution_type: Literal["pixel", "area", "pixel_area"] = "pixel_area"
    crop: bool = False
    crop_style: Literal["random", "center", "corner"] = "random"
    crop_aspect: Literal["square", "preserve", "closest", "random"] = "square"
    crop_aspect_buckets: tuple[tuple[float, float], ...] = ()
    minimum_image_size: float | None = None
    minimum_aspect_ratio: float | None = None
    maximum_aspect_ratio: float | None = None
    maximum_image_size: float | None = None
    target_downsample_size: float | None = None
    max_upscale_threshold: float | None = None
    aspect_bucket_alignment: int = 64
    aspect_bucket_rounding: int = 2


class DatasetGeometry(Section):
    """The geometry of one dataset.

    Attributes:
        vae_cache: When its latents are made: ``ahead`` of training; ``ondemand``, by training, which keeps them in the
            store; ``disabled``, by training, which keeps none (``vae_cache_ondemand``, ``vae_cache_disable``).
    """

    id: str
    geometry: Geometry
    vae_cache: VaeCache = "ahead"
