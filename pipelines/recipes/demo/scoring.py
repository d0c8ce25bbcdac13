"""Scores a drawn picture without any network: which of the demo's pictures is it nearest to?"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.recipes.demo.shapes import (
    PIXELS,
    Picture,
    old_pictures,
    parse_caption,
    ring_pictures,
)


@dataclass(frozen=True)
class Score:
    """Whether the nearest reference has the caption's colour, shape, and all three words."""

    exact: bool
    colour: bool
    shape: bool


@dataclass(frozen=True)
class Scores:
    """Share of pictures that were right, 0 .. 1."""

    exact: float
    colour: float
    shape: float


def score_picture(image: Image.Image, caption: str) -> Score:
    """Compare one picture with the 80 captioned references."""
    asked, seen = parse_caption(caption), nearest_picture(image)
    return Score(
        exact=asked.caption == seen.caption,
        colour=asked.colour == seen.colour,
        shape=asked.shape == seen.shape,
    )


def score_pictures(images: list[Image.Image], captions: list[str]) -> Scores:
    """Mean of the scores of many pictures."""
    scores = [score_picture(image, caption) for image, caption in zip(images, captions, strict=True)]
    count = len(scores)
    return Scores(
        exact=sum(score.exact for score in scores) / count,
        colour=sum(score.colour for score in scores) / count,
        shape=sum(score.shape for score in scores) / count,
    )


def nearest_picture(image: Image.Image) -> Picture:
    """The reference with the smallest squared pixel distance."""
    pictures, dots = _references()
    distances = np.square(dots - _dots(image)).mean(axis=(1, 2, 3))
    return pictures[int(distances.argmin())]


@cache
def _references() -> tuple[list[Picture], NDArray[np.float32]]:
    pictures = [*old_pictures(), *ring_pictures()]
    return pictures, np.stack([_dots(picture.draw()) for picture in pictures])


def _dots(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image.convert("RGB").resize((PIXELS, PIXELS)), dtype=np.float32) / np.float32(255)
