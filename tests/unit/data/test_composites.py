"""Cutting one picture out of several that stand side by side."""

import io

import numpy as np
import pytest
from PIL import Image

from kubetuner.config.sections.sources import Composite
from kubetuner.data.composites import cut_tile, tile_size
from kubetuner.data.pictures import PictureError, check_picture, decode_mask, measure


def encoded(image: Image.Image, kind: str = "PNG", **more: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **more)
    return stream.getvalue()


def wide(width: int = 90, height: int = 20) -> Image.Image:
    colours = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(colours)


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_tile_is_what_stands_there(kind: str, index: int) -> None:
    data = encoded(wide(), kind)
    tile = cut_tile(data, Composite(count=3, index=index))
    assert np.array_equal(pixels(tile), pixels(data)[:, 30 * index : 30 * (index + 1)])
    assert check_picture(tile).extension == "png"
    assert measure(tile) == tile_size(measure(data), Composite(count=3, index=index)) == (30, 20)


def test_without_a_composite_nothing_changes() -> None:
    data = encoded(wide(), "JPEG")
    assert cut_tile(data, None) is data
    assert tile_size((91, 20), None) == (91, 20)


def test_turned_pictures_are_cut_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    lying = wide(90, 20).transpose(Image.Transpose.ROTATE_90)
    data = encoded(lying, "PNG", exif=exif)
    tile = cut_tile(data, Composite(count=2, index=1))
    assert measure(data) == (90, 20)
    assert np.array_equal(pixels(tile), np.asarray(wide(90, 20))[:, 45:])


def test_transparency_stays_with_its_tile() -> None:
    image = wide(60, 10).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 30, 10))
    data = encoded(image)
    clear, solid = (cut_tile(data, Composite(count=2, index=index)) for index in (0, 1))
    with pytest.raises(PictureError, match="transparent"):
        decode_mask(clear)
    assert decode_mask(solid)[0].size == (30, 10)
    assert check_picture(clear).width == 30


def test_sixteen_bits_are_read_as_in_other_pictures() -> None:
    values = (np.arange(40, dtype=np.uint16).reshape(2, 20) * 1000).astype(np.uint16)
    tile = cut_tile(encoded(Image.fromarray(values)), Composite(count=2, index=1))
    assert np.array_equal(pixels(tile)[..., 0], values[:, 10:] >> 8)


@pytest.mark.parametrize("count", [4, 7, 91])
def test_a_width_that_does_not_divide_is_refused(count: int) -> None:
    expected = rf"width of 90 pixels is not that of {count} equal pictures side by side \(composite_image_config\)"
    with pytest.raises(PictureError, match=expected):
        cut_tile(encoded(wide()), Composite(count=count))
    with pytest.raises(PictureError, match=expected):
        tile_size((90, 20), Composite(count=count))


def test_damaged_pictures_are_named_as_ever() -> None:
    with pytest.raises(PictureError, match="damaged"):
        cut_tile(encoded(wide())[:-40], Composite(count=3))
