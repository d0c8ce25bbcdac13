"""Which size a picture is resized to, what is cut from it, and which bucket it lands in.

The arithmetic is SimpleTuner's: edges are rounded half-to-even to a multiple of the alignment, a bucket's target size
comes from the *rounded* aspect ratio and the size before the crop (the intermediary size) from the unrounded one.
Sizes are (width, height), crops are (top, left).

Three things differ on purpose. A crop's offsets are always those that are really cut, also for random crops. Of the
pictures in a cropped dataset only those above ``maximum_image_size`` are brought to ``target_downsample_size`` first.
And ``crop_aspect`` random chooses by a picture's key, so that a plan can tell what a cache will hold.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from kubetuner.config.sections.geometry import Geometry

Size = tuple[int, int]

SQUARE_BUCKET = 1.0
# Megapixels within SQUARE_TOLERANCE of a key have this edge in the square bucket, whatever rounding would give.
SQUARE_EDGES = ((0.25, 512), (0.5, 768), (1.0, 1024), (2.0, 1536), (4.0, 2048))
SQUARE_TOLERANCE = 0.05
# Above this a picture is refused: a few kilobytes can claim to be gigapixels.
MAX_PIXELS = 89_478_485
# And they can become gigapixels: with resolution_type pixel a strip of 5000x1 would be trained on at 5120000x1024.
MOST_SQUARES = 16
PIXELS_PER_MEGAPIXEL = 1_000_000


@dataclass(frozen=True)
class Placement:
    """Where a picture goes: resize to ``intermediary_size``, then cut ``target_size`` at ``crop``.

    Attributes:
        intermediary_size: (width, height) of the resized picture; at least ``target_size``.
        crop: (top, left) of the cut in the resized picture.
        target_size: (width, height) of the cut.
        bucket: Aspect ratio of ``target_size``, such as ``"1.75"``.
    """

    intermediary_size: Size
    crop: tuple[int, int]
    target_size: Size
    bucket: str


@dataclass(frozen=True)
class LeftOut:
    """A limit of the dataset leaves the picture out; ``reason`` names the limit and by how much it is missed."""

    reason: str


def place(
    geometry: Geometry, width: int, height: int, seed_key: str, aspect_key: str | None = None
) -> Placement | LeftOut:
    """Place a picture of ``width`` x ``height`` pixels (EXIF orientation applied).

    Args:
        geometry: The dataset's settings.
        width: Pixels.
        height: Pixels.
        seed_key: Decides where a random crop lies; equal keys give equal crops.
        aspect_key: Decides which aspect ratio ``crop_aspect`` random chooses: the picture's path in its dataset,
            which the plan knows as well as the cache does. ``seed_key`` unless given.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width}x{height} pixels cannot be placed; both edges must be at least 1")
    reason = _too_small(geometry, width, height)
    if reason:
        return LeftOut(reason)
    target = target_size(geometry, width, height, seed_key if aspect_key is None else aspect_key)
    bucket = round(target[0] / target[1], geometry.aspect_bucket_rounding)
    reason = _wrong_aspect(geometry, bucket)
    if reason:
        return LeftOut(f"{width}x{height} pixels: {reason}")
    intermediary = _cover(target, width / height)
    if _is_downsampled_first(geometry, width, height):
        own = _aspect(geometry, width, height)
        larger = _cover(_bucket_size(geometry, _downsample_edge(geometry), own), width / height)
        if larger[0] >= target[0] and larger[1] >= target[1]:
            intermediary = larger
    if reason := _too_long(geometry, target, intermediary):
        return LeftOut(f"{width}x{height} pixels: {reason}")
    if _is_enlarged_too_far(geometry, (width, height), intermediary):
        return LeftOut(
            f"{width}x{height} pixels: {intermediary[0]}x{intermediary[1]} would enlarge it by "
            f"{100 * (_enlargement((width, height), intermediary) - 1):.1f} %, above max_upscale_threshold "
            f"{geometry.max_upscale_threshold:g}"
        )
    return Placement(
        intermediary_size=intermediary,
        crop=_crop_offsets(geometry, intermediary, target, seed_key),
        target_size=target,
        bucket=str(bucket),
    )


def target_size(geometry: Geometry, width: int, height: int, aspect_key: str = "") -> Size:
    """The (width, height) in pixels that a picture of ``width`` x ``height`` ends up with."""
    if geometry.crop and geometry.crop_aspect == "square":
        edge = _square_edge(geometry, geometry.resolution)
        return edge, edge
    aspect = _aspect(geometry, width, height)
    if geometry.crop and geometry.crop_aspect == "closest":
        aspect = min((listed for listed, _ in geometry.crop_aspect_buckets), key=lambda listed: abs(listed - aspect))
    if geometry.crop and geometry.crop_aspect == "random":
        fitting = [one for one in geometry.crop_aspect_buckets if one[1] and _fits(geometry, (width, height), one[0])]
        aspect = _random_aspect(fitting, aspect_key) if fitting else SQUARE_BUCKET
    return _bucket_size(geometry, geometry.resolution, aspect)


def _aspect(geometry: Geometry, width: int, height: int) -> float:
    """The picture's own aspect ratio, rounded (``aspect_bucket_rounding``)."""
    decimals = geometry.aspect_bucket_rounding
    return max(round(width / height, decimals), 10.0**-decimals)  # never 0, however narrow the picture


def _fits(geometry: Geometry, size: Size, aspect: float) -> bool:
    """Whether a picture covers the bucket of ``aspect`` without being enlarged too far (``max_upscale_threshold``)."""
    covering = _cover(_bucket_size(geometry, geometry.resolution, aspect), size[0] / size[1])
    return not _is_enlarged_too_far(geometry, size, covering)


def _enlargement(size: Size, resized: Size) -> float:
    """How many times as long the edges become; rounding makes one a little longer than the other."""
    return min(resized[0] / size[0], resized[1] / size[1])


def _is_enlarged_too_far(geometry: Geometry, size: Size, resized: Size) -> bool:
    most = geometry.max_upscale_threshold
    return most is not None and _enlargement(size, resized) > 1 + most


def _random_aspect(buckets: Sequence[tuple[float, float]], key: str) -> float:
    """One of the aspect ratios of ``buckets``, each as likely as its weight says; always the same for ``key``."""
    digest = hashlib.sha256(b"aspect " + key.encode("utf-8", "surrogateescape")).digest()
    bounds = list(accumulate(weight for _, weight in buckets))
    point = int.from_bytes(digest[:6], "big") / (1 << 48) * bounds[-1]  # 48 bits are exact in a float: never the end
    return buckets[bisect_right(bounds, point)][0]


def _bucket_size(geometry: Geometry, resolution: float, aspect: float) -> Size:
    """The size of the bucket that ``aspect``, a rounded aspect ratio, belongs to."""
    decimals = geometry.aspect_bucket_rounding
    if geometry.resolution_type == "pixel":
        if aspect < 1:
            exact_width, exact_height = float(resolution), float(int(resolution / aspect))
        else:
            exact_width, exact_height = float(int(resolution * aspect)), float(resolution)
    else:
        edge = _align(geometry, int(math.sqrt(_area(geometry, resolution))))
        exact_width, exact_height = edge * math.sqrt(aspect), edge / math.sqrt(aspect)
    size = _align(geometry, exact_width), _align(geometry, exact_height)
    if SQUARE_BUCKET in (aspect, round(size[0] / size[1], decimals)):
        edge = _square_edge(geometry, resolution)
        return edge, edge
    return size


def _square_edge(geometry: Geometry, resolution: float) -> int:
    """The edge of the square bucket."""
    if geometry.resolution_type == "pixel":
        return _align(geometry, resolution)
    area = _area(geometry, resolution)
    for megapixels, edge in SQUARE_EDGES:
        if abs(area / PIXELS_PER_MEGAPIXEL - megapixels) <= SQUARE_TOLERANCE:
            return _align(geometry, edge)
    return _align(geometry, math.sqrt(area))


def _cover(target: Size, aspect: float) -> Size:
    """The smallest size of (unrounded) ``aspect`` that covers ``target``, in whole pixels."""
    target_width, target_height = target
    if target_width < target_height:
        width, height = target_width, int(target_width / aspect)
    else:
        width, height = int(target_height * aspect), target_height
    if width < target_width:
        return target_width, int(target_width / aspect)
    if height < target_height:
        return int(target_height * aspect), target_height
    return width, height


def _crop_offsets(geometry: Geometry, intermediary: Size, target: Size, seed_key: str) -> tuple[int, int]:
    """(top, left) of the crop."""
    spare_width, spare_height = intermediary[0] - target[0], intermediary[1] - target[1]
    if geometry.crop_style == "center":
        return spare_height // 2, spare_width // 2
    if geometry.crop_style == "corner":
        return 0, 0
    digest = hashlib.sha256(seed_key.encode("utf-8", "surrogateescape")).digest()
    top = int.from_bytes(digest[:8], "big") % (spare_height + 1)
    left = int.from_bytes(digest[8:16], "big") % (spare_width + 1)
    return top, left


def _too_small(geometry: Geometry, width: int, height: int) -> str:
    """Why the picture is below the minimum, or nothing."""
    minimum = geometry.minimum_image_size
    if not minimum:
        return ""
    got = f"{width}x{height} pixels"
    wanted = f"minimum_image_size {minimum:g} ({geometry.resolution_type})"
    if geometry.resolution_type == "pixel":
        return f"{got}: an edge is below {wanted}" if min(width, height) < minimum else ""
    area = _area(geometry, minimum)
    if width * height < area:
        return f"{got}: the area is below {wanted}"
    edge = int(math.sqrt(area))
    if geometry.crop and geometry.crop_aspect == "square" and min(width, height) < edge:
        return f"{got}: an edge is below {edge}, which square crops need for {wanted}"
    return ""


def _wrong_aspect(geometry: Geometry, bucket: float) -> str:
    """Why ``bucket`` is outside the limits of aspect ratios, or nothing. Like SimpleTuner's, they judge buckets."""
    least, most = geometry.minimum_aspect_ratio, geometry.maximum_aspect_ratio
    if least is not None and bucket < least:
        return f"aspect ratio {bucket:g} is below minimum_aspect_ratio {least:g}"
    if most is not None and bucket > most:
        return f"aspect ratio {bucket:g} is above maximum_aspect_ratio {most:g}"
    return ""


def _too_long(geometry: Geometry, target: Size, intermediary: Size) -> str:
    """Why a strip of a picture would become far too many pixels, or nothing."""
    edge = _square_edge(geometry, geometry.resolution)
    listed = geometry.crop and geometry.crop_aspect in ("closest", "random")
    if not listed and target[0] * target[1] > MOST_SQUARES * edge**2:
        return (
            f"it would be trained on at {target[0]}x{target[1]}, more than {MOST_SQUARES} times the pixels of "
            f"{edge}x{edge}; cut it up, or set resolution_type to pixel_area"
        )
    if intermediary[0] * intermediary[1] > MAX_PIXELS:
        return (
            f"it would be resized to {intermediary[0]}x{intermediary[1]} before it is cut, more than {MAX_PIXELS} "
            "pixels; cut it up"
        )
    return ""


def _is_downsampled_first(geometry: Geometry, width: int, height: int) -> bool:
    maximum = geometry.maximum_image_size
    if not geometry.crop or not maximum or not geometry.target_downsample_size:
        return False
    if geometry.resolution_type == "pixel":
        return max(width, height) > maximum
    return width * height > _area(geometry, maximum)


def _downsample_edge(geometry: Geometry) -> float:
    return geometry.target_downsample_size or geometry.resolution


def _area(geometry: Geometry, value: float) -> float:
    """Square pixels of a setting in ``area`` or ``pixel_area`` units."""
    return value * value if geometry.resolution_type == "pixel_area" else value * PIXELS_PER_MEGAPIXEL


def _align(geometry: Geometry, value: float) -> int:
    """The nearest multiple of the alignment (half to even), at least one."""
    alignment = geometry.aspect_bucket_alignment
    return max(alignment, round(value / alignment) * alignment)
