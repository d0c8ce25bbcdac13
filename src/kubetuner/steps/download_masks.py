"""The part of ``download_dataset`` that brings masks: each with its picture, or neither."""

import logging
from contextlib import ExitStack, closing
from dataclasses import dataclass

from kubetuner.config.sections.sources import MaskKind, MaskSource
from kubetuner.data.composites import cut_tile
from kubetuner.data.geometry import Size
from kubetuner.data.masks import Pairs, check_mask, misfit, pair
from kubetuner.data.pictures import PictureError
from kubetuner.errors import DatasetError, on_one_line
from kubetuner.sources.base import Item, ItemError, Source, as_planned, named
from kubetuner.sources.items import Items
from kubetuner.sources.switch import open_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskOrigin:
    """Where the masks of one dataset's pictures are."""

    settings: MaskSource
    source: Source
    pairs: Pairs


@dataclass(frozen=True)
class TakenMask:
    """A mask's bytes, that were decoded."""

    data: bytes
    extension: str
    kind: MaskKind


def open_masks(settings: MaskSource, pictures: Items, stack: ExitStack) -> MaskOrigin:
    """Find the masks of ``pictures``; ``stack`` closes their source.

    Raises:
        DatasetError: The masks cannot be listed, changed after the plan, or are not one per picture.
    """
    name = settings.source.id
    try:
        source = stack.enter_context(closing(open_source(settings.source)))
        listing = as_planned(source.listing(), settings.source.revision, settings.source.newest)
        pairs = pair(pictures, listing.pictures)
    except DatasetError as error:
        raise DatasetError(f"its masks {name!r}: {error}") from error
    if pairs.unused:
        logger.warning("%s: %d masks have no picture: %s", name, len(pairs.unused), on_one_line(named(pairs.unused)))
    return MaskOrigin(settings, source, pairs)


def take_mask(origin: MaskOrigin, picture: Item, size: Size) -> TakenMask:
    """Read and check the mask of a picture of ``size`` (width, height).

    Raises:
        PictureError: There is none, or it cannot be used; a picture without its mask would be learned in full.
        DatasetError: The source fails.
    """
    dataset = origin.settings.source.id
    item = origin.pairs.masks.get(picture.name)
    if item is None:
        raise PictureError(f"it has no mask in dataset {dataset!r}")
    try:
        data = cut_tile(origin.source.read(item), origin.settings.source.composite)
        info = check_mask(data, origin.settings.kind)
    except (ItemError, PictureError) as error:
        raise PictureError(f"its mask {dataset}/{on_one_line(item.name)}: {error.reason}") from error
    if wrong := misfit(info.size, size):
        raise PictureError(wrong)
    if info.doubt:
        logger.warning("mask %s/%s: %s", dataset, on_one_line(item.name), info.doubt)
    return TakenMask(data, info.extension, origin.settings.kind)
