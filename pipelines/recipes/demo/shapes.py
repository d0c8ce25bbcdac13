"""Draws the demo's captioned pictures: one coloured shape on a plain background."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 80, 220),
    "yellow": (240, 205, 40),
    "purple": (140, 60, 180),
    "orange": (245, 130, 30),
    "cyan": (40, 190, 210),
    "pink": (240, 120, 185),
}
BACKGROUNDS: dict[str, Rgb] = {"white": (245, 245, 245), "black": (20, 20, 20)}
OLD_SHAPES = ("circle", "square", "triangle", "star")
NEW_SHAPE = "ring"
ALL_SHAPES = (*OLD_SHAPES, NEW_SHAPE)
PIXELS = 64
"""Edge of a picture: the smallest bucket that training accepts."""

_OVERSAMPLING = 4
_RING_HOLE = 0.5


@dataclass(frozen=True)
class Picture:
    """What one picture shows. Lengths are fractions of the picture's edge."""

    colour: str
    shape: str
    background: str
    radius: float = 0.32
    centre: tuple[float, float] = (0.5, 0.5)

    @property
    def caption(self) -> str:
        """The sentence a model is asked to draw."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} on a {self.background} background"

    @property
    def file_name(self) -> str:
        """The caption as a file name."""
        return self.caption.replace(" ", "_") + ".png"

    def draw(self, pixels: int = PIXELS) -> Image.Image:
        """Draw it with smooth edges."""
        edge = pixels * _OVERSAMPLING
        image = Image.new("RGB", (edge, edge), BACKGROUNDS[self.background])
        pencil = ImageDraw.Draw(image)
        x, y, radius = self.centre[0] * edge, self.centre[1] * edge, self.radius * edge
        _PAINTERS[self.shape](pencil, (x, y, radius), COLOURS[self.colour])
        if self.shape == NEW_SHAPE:
            _circle(pencil, (x, y, radius * _RING_HOLE), BACKGROUNDS[self.background])
        return image.resize((pixels, pixels), Image.Resampling.BOX)


def parse_caption(caption: str) -> Picture:
    """The picture a caption asks for; ValueError when it isn't one of this vocabulary."""
    words = caption.split()
    picture = Picture(words[1], words[2], words[5]) if len(words) == 7 else None
    if (
        picture is None
        or picture.caption != caption
        or picture.colour not in COLOURS
        or picture.shape not in ALL_SHAPES
        or picture.background not in BACKGROUNDS
    ):
        raise ValueError(f"not a caption of the demo: {caption!r}")
    return picture


def old_pictures() -> list[Picture]:
    """The 64 pictures that the bases were trained on."""
    return list(_every(OLD_SHAPES))


def ring_pictures() -> list[Picture]:
    """The 16 pictures of the shape that the bases have never seen."""
    return list(_every((NEW_SHAPE,)))


def ring_eval_pictures() -> list[Picture]:
    """Eight held-out rings: the same words, another size and place."""
    return [
        Picture(
            colour,
            NEW_SHAPE,
            "white" if index % 2 else "black",
            radius=0.30 if index % 4 < 2 else 0.34,
            centre=(0.48 + 0.01 * (index % 5), 0.52 - 0.01 * (index % 4)),
        )
        for index, colour in enumerate(COLOURS)
    ]


def random_pictures(count: int, rng: random.Random, shapes: Sequence[str] = ALL_SHAPES) -> list[Picture]:
    """Pictures of any size, place, colour and background."""
    return [
        scattered(
            Picture(rng.choice(list(COLOURS)), rng.choice(shapes), rng.choice(list(BACKGROUNDS))),
            rng,
        )
        for _ in range(count)
    ]


def scattered(picture: Picture, rng: random.Random) -> Picture:
    """The same caption at another size and place."""
    centre = (rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58))
    radius = rng.uniform(0.22, 0.36)
    return Picture(picture.colour, picture.shape, picture.background, radius, centre)


def write_pictures(pictures: Sequence[Picture], folder: Path) -> None:
    """Write optimised PNG files, each named after its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        picture.draw().save(folder / picture.file_name, optimize=True)


def _every(shapes: Sequence[str]) -> Iterator[Picture]:
    for colour, shape, background in product(COLOURS, shapes, BACKGROUNDS):
        yield Picture(colour, shape, background)


_Place = tuple[float, float, float]
"""Centre x, centre y and radius, in dots."""


def _circle(pencil: ImageDraw.ImageDraw, place: _Place, fill: Rgb) -> None:
    x, y, radius = place
    pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _square(pencil: ImageDraw.ImageDraw, place: _Place, fill: Rgb) -> None:
    x, y, radius = place
    half = radius * 0.88
    pencil.rectangle((x - half, y - half, x + half, y + half), fill=fill)


def _triangle(pencil: ImageDraw.ImageDraw, place: _Place, fill: Rgb) -> None:
    x, y, radius = place
    base = y + radius * 0.8
    pencil.polygon([(x, y - radius), (x + radius, base), (x - radius, base)], fill=fill)


def _star(pencil: ImageDraw.ImageDraw, place: _Place, fill: Rgb) -> None:
    x, y, radius = place
    corners = []
    for corner in range(10):
        reach = radius * (0.45 if corner % 2 else 1.1)
        angle = math.pi * (corner / 5 - 0.5)
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    pencil.polygon(corners, fill=fill)


_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, _Place, Rgb], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    NEW_SHAPE: _circle,
}
