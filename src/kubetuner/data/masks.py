"""Masks: which picture each belongs to, and how much of the loss it lets through at the size of latents.

A mask belongs to the picture with the same path up to the extension. It is resized and cut exactly as its picture is,
and its values 0..255 are weights 0..1. Only :func:`to_weights` needs torch.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from PIL import Image, ImageChops

from kubetuner.config.sections.sources import MaskKind
from kubetuner.data.geometry import Placement, Size
from kubetuner.data.pictures import decode_mask
from kubetuner.errors import DatasetError
from kubetuner.sources.base import PICTURE_EXTENSIONS, Item, named

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "mask"
"""Name of a mask's tensor in its shard."""
_DARK = 128
# JPEG leaves traces of colour in grey pictures.
_GREY = 16


@dataclass(frozen=True)
class Pairs:
    """What belongs together.

    Attributes:
        masks: Mask by the name of its picture.
        missing: Pictures without a mask.
        unused: Masks without a picture.
    """

    masks: dict[str, Item]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class MaskInfo:
    """What decoding a mask's bytes showed.

    Attributes:
        size: (width, height) in pixels, EXIF orientation applied.
        extension: Usual file extension of its format, without a dot.
        doubt: Why it may not be what was meant, or nothing.
    """

    size: Size
    extension: str
    doubt: str


def pair(pictures: Sequence[Item], masks: Sequence[Item]) -> Pairs:
    """Find each picture's mask.

    Raises:
        DatasetError: Masks differ in nothing but their extension.
    """
    by_stem: dict[str, list[Item]] = defaultdict(list)
    for mask in masks:
        by_stem[_stem(mask.name)].append(mask)
    doubled = [" and ".join(one.name for one in found) for found in by_stem.values() if len(found) > 1]
    if doubled:
        raise DatasetError(f"{named(doubled)} belong to the same picture; keep one mask each")
    found = {picture.name: by_stem[stem][0] for picture in pictures if (stem := _stem(picture.name)) in by_stem}
    used = {mask.name for mask in found.values()}
    return Pairs(
        found,
        tuple(picture.name for picture in pictures if picture.name not in found),
        tuple(mask.name for mask in masks if mask.name not in used),
    )


def misfit(mask: Size, picture: Size) -> str:
    """Why a mask of that (width, height) cannot be laid over the picture, or nothing.

    A mask may be larger or smaller than its picture, and its edges may have been rounded to a pixel.
    """
    width, height = picture
    if abs(mask[0] * height - mask[1] * width) < max(picture):
        return ""
    return (
        f"its mask has {mask[0]}x{mask[1]} pixels, aspect ratio {mask[0] / mask[1]:.3f}, and the picture "
        f"{width}x{height}, {width / height:.3f}; a mask that is {mask[0]} wide must be {mask[0] * height / width:.0f} "
        "high"
    )


def check_mask(data: bytes, kind: MaskKind) -> MaskInfo:
    """Decode a mask's bytes completely and describe it.

    Raises:
        PictureError: They are damaged, too large or no picture, or partly transparent.
    """
    image, extension = decode_mask(data)
    return MaskInfo(image.size, extension, _doubt(image, kind))


def to_weights(data: bytes, kind: MaskKind, placement: Placement, factor: int) -> "Tensor":
    """How much each latent pixel's loss counts, float16 ``[1, h, w]`` in 0..1.

    ``mask`` takes the mean of the first channel over the pixels of a latent, ``segmentation`` is 1 where any of them
    is not black. Resizing takes means too: other filters would ring, and what rings counts.

    Args:
        data: The mask's bytes.
        kind: ``conditioning_type``.
        placement: How its picture is resized and cut.
        factor: Pixels per latent along an edge.
    """
    import torch
    from torch.nn.functional import avg_pool2d

    image, _ = decode_mask(data)
    if kind == "mask":
        image = image.getchannel(0)
    if image.size != placement.intermediary_size:
        image = image.resize(placement.intermediary_size, Image.Resampling.BOX)
    (top, left), (width, height) = placement.crop, placement.target_size
    cut = image.crop((left, top, left + width, top + height))
    values = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).view(height, width, -1)
    means = avg_pool2d(values.float().mean(-1)[None] / 255, factor)
    return (means if kind == "mask" else (means > 0)).to(torch.float16)


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("") if path.suffix.lower() in PICTURE_EXTENSIONS else path)


def _doubt(image: Image.Image, kind: MaskKind) -> str:
    red, green, blue = image.split()
    if not image.getbbox():
        return "it is black everywhere, so that nothing is learned from its picture"
    if kind == "segmentation":
        return ""
    most = _most(red)
    if max(_most(ImageChops.difference(red, other)) for other in (green, blue)) > _GREY:
        return f"it is coloured; its red channel alone counts, whose brightest pixel is {most} of 255"
    return f"its brightest pixel is {most} of 255, so that nothing counts in full" if most < _DARK else ""


def _most(channel: Image.Image) -> int:
    return max(value for value, count in enumerate(channel.histogram()) if count)
